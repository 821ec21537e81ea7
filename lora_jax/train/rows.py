"""The rows of a training's metrics, as metrics.jsonl and the trackers have them."""

from __future__ import annotations

import functools
from typing import Any

from lora_jax.train.loop import Callback, Training
from lora_jax.train.optimizer import make_schedule


class MetricRows(Callback):
    """Makes a row of each log and of each evaluation; `unit` is what is trained per second."""

    def __init__(self, unit: str):
        self._unit = unit

    def row(self, training: Training, k: int, split: str, values: dict[str, Any]) -> None:
        """The metrics of cell k's present step on a split."""
        raise NotImplementedError

    def logged(self, training, k, values):
        cell = training.cells[k]
        rate = rate_at(training, k, cell.progress.step - 1)
        more = {"lr": rate, f"{self._unit}_per_s": cell.rate}
        self.row(training, k, "train", {**values, **more, "seconds": _seconds(training, k)})

    def evaluated(self, training, k, values):
        self.row(training, k, "validation", {**values, "seconds": _seconds(training, k)})


def rate_at(training: Training, k: int, step: int) -> float:
    """The learning rate of cell k."""
    optimizer = training.cells[k].settings.config.optimizer
    rate: Any = _schedule_of(optimizer, training.schedule.num_steps)(step)
    return float(rate)


_schedule_of = functools.lru_cache(maxsize=1024)(make_schedule)


def _seconds(training: Training, k: int) -> float:
    return sum(training.cells[k].progress.seconds.values())
