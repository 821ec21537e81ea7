"""What is kept of a reported run's test predictions: losses as float16, and what was right."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_jax.data import load_splits
from lora_jax.report.runs import FinishedRun
from lora_jax.report.statistics import spread_over_weights
from lora_jax.settings import Settings
from lora_jax.train.task import task_of


@dataclasses.dataclass(frozen=True)
class Kept:
    """Of a reported run: `loss`, `weight` (N,) float64, `correct` (N,), `label` (N,) or None."""

    loss: np.ndarray
    correct: np.ndarray
    label: np.ndarray | None  # None for texts
    index: np.ndarray
    weight: np.ndarray
    unit: np.ndarray | None = None

    def losses(self) -> np.ndarray:
        """(units,) losses whose plain mean is the loss per example, or per token."""
        loss, weight = self.loss, self.weight
        if self.unit is not None:
            total = np.bincount(self.unit, weight)
            loss, weight = np.bincount(self.unit, weight * loss) / total, total
        return spread_over_weights(loss, weight)


def kept_of(run: FinishedRun) -> Kept:
    """Of completions the units are prompts: pairs of one prompt have much in common, and intervals
    of pairs would be too narrow."""
    own = run.predictions
    assert own is not None
    unit = None
    if not np.all(own.weight == 1):
        texts = _test_texts(json.dumps(run.config))
        unit = np.unique([texts[n] for n in own.index], return_inverse=True)[1]
    return Kept(own.loss, own.correct, own.label, own.index, own.weight, unit)


@functools.lru_cache(maxsize=1)
def _test_texts(config: str) -> Sequence[str]:
    settings = Settings.from_config(json.loads(config))
    return load_splits(settings.data, target=task_of(settings.model).target).test.texts


def packed(predictions: Mapping[str, Kept]) -> bytes:
    """One npz: runs of the same test examples together, losses as float16, bits packed."""
    groups: dict[bytes, list[str]] = {}
    for name, one in predictions.items():
        groups.setdefault(one.index.tobytes() + one.weight.tobytes(), []).append(name)
    arrays = {}
    for number, names in enumerate(groups.values()):
        first = predictions[names[0]]
        own = {
            "cells": np.array(names),
            "loss": np.stack([predictions[n].loss for n in names]).astype(np.float16),
            "index": first.index.astype(np.int32),
        }
        correct = np.stack([predictions[n].correct for n in names])
        plain = correct.dtype == bool
        own["correct"] = np.packbits(correct, axis=1) if plain else correct.astype(np.float16)
        if plain and first.label is not None:
            own["label"] = first.label.astype(np.int16)
        if not np.all(first.weight == 1):
            own["weight"] = first.weight.astype(np.float32)
        if first.unit is not None:
            own["unit"] = first.unit.astype(np.int32)
        arrays |= {f"{number}/{key}": value for key, value in own.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def read_predictions(path: Path) -> dict[str, Kept]:
    """What `packed` wrote, by the names of the runs; {} where there is no file."""
    if not path.exists():
        return {}
    found = {}
    with np.load(path, allow_pickle=False) as arrays:
        for number in sorted({key.partition("/")[0] for key in arrays.files}, key=int):
            own = {
                key.partition("/")[2]: arrays[key]
                for key in arrays.files
                if key.partition("/")[0] == number
            }
            count = len(own["index"])
            for row, name in enumerate(own["cells"]):
                correct = own["correct"][row]
                if correct.dtype == np.uint8:
                    correct = np.unpackbits(correct)[:count].astype(bool)
                found[str(name)] = Kept(
                    own["loss"][row].astype(np.float64), correct, own.get("label"),
                    own["index"].astype(np.int64),
                    own.get("weight", np.ones(count)).astype(np.float64), own.get("unit"),
                )  # fmt: skip
    return found
