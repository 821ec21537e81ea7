"""A study's committed record: what of its finished runs goes into the repository, read back.

`results/NAME` holds, for every run, a line in cells.jsonl and its whole card in cards.jsonl.gz;
for every reported run each test example's loss (float16) and whether it was right, in
predictions.npz; and what each tuning chose, in tuned.json. Verdicts, tables and figures are made
from these files alone, so that anybody can recompute them without the runs.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis.findings import cell_record
from experiments.analysis.predictions import kept_of, packed, read_predictions
from lora_jax import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.io import atomic_path, write_json, write_text
from lora_jax.report.runs import FinishedRun, read_runs

CELLS, CARDS, TUNED, PREDICTIONS = "cells.jsonl", "cards.jsonl.gz", "tuned.json", "predictions.npz"
# A run that ends within 3% of the loss of the classes' prior has learned nothing.
COLLAPSED = 0.97


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: its tuning, and its reported runs.

    `points` are the values that were tried of the settings `keys`, `tuning` the validation losses
    (points, choosing seeds) in nats, `chosen` the point with the lowest mean. `losses (seeds,
    examples)` float64 nats, and `right` alike, are of the reported runs, in the order of `seeds`;
    `prior` is the loss of the classes' prior on the test examples, None for texts.
    """

    name: str
    cells: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    losses: np.ndarray
    right: np.ndarray
    prior: float | None = None
    keys: tuple[str, ...] = ()
    points: tuple[tuple[Any, ...], ...] = ()
    tuning: np.ndarray | None = None
    chosen: tuple[Any, ...] = ()

    @property
    def parameters(self) -> int:
        """The adapter's parameters."""
        return self.cells[0]["adapter_parameters"]

    @property
    def collapsed(self) -> tuple[int, ...]:
        """The reported seeds whose run ended at the prior's loss."""
        if self.prior is None:
            return ()
        means = self.losses.mean(axis=1)
        return tuple(
            s for s, x in zip(self.seeds, means, strict=True) if x > COLLAPSED * self.prior
        )

    @property
    def at_edge(self) -> bool:
        """Whether the chosen point is at the edge of its grid."""
        columns = zip(self.chosen, zip(*self.points, strict=True), strict=True)
        return any(x in (min(tried), max(tried)) for x, tried in columns if len(set(tried)) > 1)

    @functools.cached_property
    def choices(self) -> tuple[tuple[Any, ...], ...]:
        """What each choosing seed alone would have chosen."""
        if self.tuning is None:
            return ()
        return tuple(self.points[n] for n in self.tuning.argmin(axis=0))


@dataclasses.dataclass(frozen=True)
class Study:
    """The arms by name, and every run's line of cells.jsonl, in the order they were added."""

    name: str
    arms: dict[str, Arm]
    cells: tuple[dict[str, Any], ...]

    def __getitem__(self, name: str) -> Arm:
        if name not in self.arms:
            raise RequestError(f"{self.name} has no arm {name!r}; {nearest(name, self.arms)}")
        return self.arms[name]


def read_tuned(folder: str | Path) -> dict[str, Any]:
    """What each tuning of a workdir, or of a study's record, chose; {} where nothing was tuned."""
    path = Path(folder) / TUNED
    return json.loads(path.read_text()) if path.exists() else {}


def collect(workdirs: Sequence[str | Path], out: str | Path) -> None:
    """Writes the record of the finished runs of sweeps into the folder `out`.

    A workdir may be a folder of workdirs. Runs that `out` has already and no workdir has any more
    stay: a study may be collected in parts. Raises `RequestError` for a folder without a sweep, or
    a run that `out` has from another config.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    folders = [place for one in workdirs for place in sweeps_in(Path(one))]
    tuned = read_tuned(out)
    rows = {row["cell"]: row for row in read_cells(out)} if (out / CELLS).exists() else {}
    cards = {json.loads(line)["cell"]: line for line in _read_lines(out / CARDS)}
    predictions = read_predictions(out / PREDICTIONS)
    for folder in folders:
        sweep = json.loads((folder / "sweep.json").read_text())
        tuned |= read_tuned(folder)
        runs = {run.name: run for run in read_runs(folder) if isinstance(run, FinishedRun)}
        # A sweep that has not ended does not list the seeds that run at what was chosen.
        for name in (n for n in dict.fromkeys([*sweep["cells"], *sorted(runs)]) if n in runs):
            run, arm = runs[name], arm_of(name, tuned)
            row = cell_record(run) | {
                "arm": arm,
                "head_lr": run.config["optimizer"].get("head_lr", 0.0),
                "alpha": run.config["method"].get("alpha"),
                "tuning": run.config["seed"] in _choosing(tuned.get(arm)),
                "point": [_setting(run.config, key) for key in _keys(tuned.get(arm))],
                "stopped": run.card.metrics.stopped,
            }
            if rows.get(name, row)["config_hash"] != row["config_hash"]:
                raise RequestError(f"{out} has {name} from another config; collect to a new folder")
            rows[name] = row
            cards[name] = json.dumps({"cell": name, **run.card.to_json()})
            if not row["tuning"] and run.predictions is not None:
                predictions[name] = kept_of(run)
    write_text(out / CELLS, "".join(json.dumps(row) + "\n" for row in rows.values()))
    write_json(out / TUNED, tuned)
    _write_bytes(out / CARDS, _gzipped("".join(f"{cards[name]}\n" for name in rows)))
    _write_bytes(out / PREDICTIONS, packed(predictions))


def read_numbers(path: Path) -> dict[str, Any]:
    """The numbers that an analysis kept. Raises `RequestError` where there are none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"there is no {path}; give the workdir of what_rank_2's sweeps, to measure its runs"
        ) from error


def folders_of(folder: str | Path, names: Iterable[str]) -> dict[str, dict[int, Path]]:
    """`reported_folders` of these arms. Raises `RequestError` for one that is not there."""
    found = reported_folders(folder)
    if missing := [name for name in names if name not in found]:
        raise RequestError(
            f"{folder} has no reported run of {missing[0]!r}; {nearest(missing[0], found)}"
        )
    return {name: found[name] for name in names}


def reported_folders(folder: str | Path) -> dict[str, dict[int, Path]]:
    """`{arm: {seed: folder of its run}}` of the finished, reported runs of the sweeps there."""
    found: dict[str, dict[int, Path]] = {}
    for place in sweeps_in(Path(folder)):
        tuned = read_tuned(place)
        for run in read_runs(place):
            arm = arm_of(run.name, tuned)
            own, seed = tuned.get(arm), run.config.get("seed")
            point = [_setting(run.config, key) for key in _keys(own)]
            if run.finished and seed not in _choosing(own) and point == _chosen(own):
                found.setdefault(arm, {})[seed] = run.folder
    return found


def arm_of(cell: str, tuned: Iterable[str] = ()) -> str:
    """The arm a cell belongs to: `full` of `full-lr0.001-s0`, or of `full-s0`."""
    named = (name for name in tuned if cell.startswith(f"{name}-"))
    before = cell.rpartition("-s")[0]
    known = before.partition("-lr")[0]
    return known if known in tuned else max(named, key=len, default=known)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The lines of cells.jsonl. Raises `RequestError` where there is none."""
    try:
        return [json.loads(line) for line in (folder / CELLS).read_text().splitlines()]
    except OSError as error:
        raise RequestError(f"{folder} has no {CELLS}; collect a finished sweep there") from error


def read_study(folder: str | Path) -> Study:
    """The record in `folder`. Raises `RequestError` where it is not one."""
    folder = Path(folder)
    cells = read_cells(folder)
    tuned = read_tuned(folder)
    predictions = read_predictions(folder / PREDICTIONS)
    names = dict.fromkeys(row["arm"] for row in cells)
    arms = {}
    for name in names:
        own = [row for row in cells if row["arm"] == name]
        if reported := [row for row in own if row["cell"] in predictions]:
            arms[name] = _arm(name, own, reported, tuned.get(name), predictions)
    return Study(folder.name, arms, tuple(cells))


def _arm(name, own, reported, tuned, predictions) -> Arm:
    reported = sorted(reported, key=lambda row: row["seed"])
    if tuned is not None:  # runs at a point that was chosen before the grid grew are not reported
        reported = [row for row in reported if row["point"] == _chosen(tuned)]
    some = [predictions[row["cell"]] for row in reported]
    losses = np.stack([p.losses() for p in some])
    label = some[0].label
    arm = Arm(
        name, tuple(own), tuple(row["seed"] for row in reported), losses,
        np.stack([p.correct for p in some]),
        None if label is None else _entropy(label),
    )  # fmt: skip
    if tuned is None:
        return arm
    points = tuple(tuple(x) if isinstance(x, list) else (x,) for x in tuned["values"])
    losses = tuned.get("by_seed") or [[x] for x in tuned["validation_losses"]]
    return dataclasses.replace(
        arm, keys=tuple(_keys(tuned)), points=points, tuning=np.array(losses, np.float64),
        chosen=tuple(_chosen(tuned)),
    )  # fmt: skip


def _entropy(labels: np.ndarray) -> float:
    share = np.bincount(labels) / len(labels)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def sweeps_in(folder: Path) -> list[Path]:
    """The workdirs of sweeps that a folder is or holds. Raises `RequestError` for none."""
    found = [folder] if (folder / "sweep.json").exists() else []
    found += sorted(place.parent for place in folder.glob("*/sweep.json"))
    if not found:
        raise RequestError(f"{folder} has no sweep.json; give the --workdir of a sweep")
    return found


def _choosing(tuned: dict[str, Any] | None) -> tuple[int, ...]:
    """The seeds that only choose: several, or none where one both chooses and is reported."""
    seeds = (tuned or {}).get("seed", ())
    return tuple(seeds) if isinstance(seeds, list) else ()


def _keys(tuned: dict[str, Any] | None) -> list[str]:
    keys = (tuned or {}).get("key", [])
    return keys if isinstance(keys, list) else [keys]


def _chosen(tuned: dict[str, Any] | None) -> list[Any]:
    chosen = (tuned or {}).get("chosen", [])
    return chosen if isinstance(chosen, list) else [chosen]


def _setting(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _read_lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []


def _gzipped(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(content)
