"""Reads the runs of a working folder: finished ones whole, unfinished ones as far as they got."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.io.untrusted import check_fields, is_number_or_null, read_arrays
from lora_jax.train.metrics import read_metrics
from lora_jax.train.record import RESTORE, Card
from lora_jax.train.workdir import read_json_file


@dataclass(frozen=True)
class Predictions:
    """A run's predictions of the test examples, in ascending order of `index`.

    loss (N,) float64 in nats (regression: squared error); correct (N,) bool (completions: the share
    of right tokens, float64); label (N,) int64 (regression: float64); index (N,) int64; weight (N,)
    float64 by which the means are taken (completions: their numbers of tokens; else 1).
    """

    loss: np.ndarray
    correct: np.ndarray
    label: np.ndarray
    index: np.ndarray
    weight: np.ndarray

    def mean(self, quantity: str) -> float:
        """The weighted mean of "loss" or "correct", as the card has it."""
        return float(np.average(getattr(self, quantity), weights=self.weight))


@dataclass(frozen=True)
class Run:
    """One cell of a working folder, under way or ended before its time."""

    name: str
    folder: Path
    config: dict[str, Any]
    history: tuple[dict[str, Any], ...]

    @property
    def finished(self) -> bool:
        """Whether the run has ended and written its card."""
        return isinstance(self, FinishedRun)

    @property
    def status(self) -> str:
        """Why the run ended, in its own words, or how far it has got."""
        return (
            f"unfinished, at step {self.last_step}" if self.history else "unfinished, no step yet"
        )

    @property
    def last_step(self) -> int:
        """The last step in its metrics, 0 where there is none."""
        return max((entry["step"] for entry in self.history), default=0)

    def curve(self, split: str, quantity: str = "loss") -> tuple[np.ndarray, np.ndarray]:
        """Steps (M,) int64 and values (M,) float64 of one quantity on one split."""
        entries = [
            entry
            for entry in self.history
            if entry.get("split") == split and entry.get(quantity) is not None
        ]
        steps = np.array([entry["step"] for entry in entries], np.int64)
        return steps, np.array([entry[quantity] for entry in entries], np.float64)


@dataclass(frozen=True)
class FinishedRun(Run):
    """A cell that has ended and written its card; `predictions` are None if their file is gone."""

    card: Card
    predictions: Predictions | None

    @property
    def status(self) -> str:
        """Why the run ended."""
        return self.card.metrics.stopped


def finished_runs(runs: Iterable[Run]) -> list[FinishedRun]:
    """Those of the runs that have a card."""
    return [run for run in runs if isinstance(run, FinishedRun)]


def read_runs(folder) -> list[Run]:
    """Every run under `folder`/cells in order of name, finished or not.

    Raises:
      RequestError: there is no such folder, it holds no cells, or a file of a cell is malformed
        (the message names it). A torn last line of metrics.jsonl is what a running or killed run
        leaves, and is passed over.
    """
    folder = at_home(folder)
    if not folder.is_dir():
        raise RequestError(f"no folder {folder}; give the --workdir of a training run")
    # A name that starts with a dot is a cell still being put in place (io.atomic).
    found = sorted(p for p in folder.glob("cells/[!.]*") if p.is_dir())
    if found:
        return [_read_run(cell) for cell in found]
    if (folder / "card.json").exists() or (folder / "metrics.jsonl").exists():
        raise RequestError(f"{folder} is one cell; give its working folder {folder.parent.parent}")
    raise RequestError(f"{folder} holds no runs (no cells/*); give the --workdir of a training run")


def _read_run(cell: Path) -> Run:
    card_path, config_path = cell / "card.json", cell / "config.json"
    predictions_path = cell / "test_predictions.npz"
    history = _read_history(cell / "metrics.jsonl")
    if card_path.exists():
        card = Card.read(card_path)
        predictions = _read_predictions(predictions_path) if predictions_path.exists() else None
        return FinishedRun(cell.name, cell, card.config, history, card, predictions)
    config = read_json_file(config_path) if config_path.exists() else {}
    check_fields(config, {}, config_path, RESTORE)
    return Run(cell.name, cell, config, history)


def _read_history(path: Path) -> tuple[dict[str, Any], ...]:
    """The entries by step; of a step logged twice (before and after a resume) the later one."""
    entries = {}
    for entry in read_metrics(path):
        try:
            key = (int(entry["step"]), str(entry["split"]))
            if not all(is_number_or_null(entry.get(k)) for k in ("loss", "accuracy", "lr")):
                raise TypeError("not a number")
            if not 0 <= key[0] < 2**53:
                raise ValueError("no step")
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise RequestError(
                f"{path}: {reprlib.repr(entry)} is no metrics entry; remove that line or rerun the "
                "cell"
            ) from error
        entries[key] = {**entry, "step": key[0]}
    return tuple(entries[key] for key in sorted(entries))


def _read_predictions(path: Path) -> Predictions:
    try:
        arrays = read_arrays(path)
        lists = [arrays[name] for name in ("loss", "correct", "label", "index")]
        lists.append(arrays["weight"] if "weight" in arrays else np.ones(lists[-1].shape))
    except (OSError, ValueError, KeyError) as error:
        raise _malformed(path, f"not the predictions of a run ({error})") from error
    index, weight = lists[-2:]
    if index.ndim != 1 or any(one.shape != index.shape for one in lists):
        raise _malformed(path, "its arrays are not lists of one length")
    if any(one.dtype.kind not in "biuf" for one in lists) or index.dtype.kind not in "iu":
        raise _malformed(path, "its arrays are not of numbers")
    order = np.argsort(index, kind="stable")
    if not len(index) or np.any(np.diff(index[order]) == 0):
        raise _malformed(path, "no example, or one example twice")
    if not np.all(weight > 0):
        raise _malformed(path, "a weight is not above 0")
    # Of what may be a share, or a number: floating arrays are float64, others of the type given.
    kinds = (np.float64, bool, np.int64, np.int64, np.float64)
    loss, correct, label, index, weight = (
        one[order].astype(np.float64 if one.dtype.kind == "f" else kind)
        for one, kind in zip(lists, kinds, strict=True)
    )
    return Predictions(loss, correct, label, index, weight)


def _malformed(path: Path, reason: str) -> RequestError:
    return RequestError(f"{path} is malformed: {reason}; rerun this cell or remove its folder")
