"""Callbacks of a training on disk: metrics, checkpoints, a display, stopping at a signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.loop import Callback, Training
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.numerics import numerics
from lora_jax.train.progress import Show


class MetricsFiles(Callback):
    """Writes each cell's metrics; before a checkpoint they are synced and their lines counted.

    `schedules` gives each cell's learning rate at a step; `unit` is what is trained per second.
    """

    def __init__(
        self,
        writers: Sequence[MetricsWriter],
        schedules: Sequence[Callable[[int], Any]],
        unit: str,
    ):
        self._writers, self._schedules, self._unit = writers, schedules, unit

    def logged(self, training, k, values):
        progress = training.cells[k].progress
        self._writers[k].write(
            step=progress.step,
            split="train",
            **values,
            lr=float(self._schedules[k](progress.step - 1)),
            **{f"{self._unit}_per_s": training.cells[k].rate},
            seconds=sum(progress.seconds.values()),
        )

    def evaluated(self, training, k, loss, accuracy):
        progress = training.cells[k].progress
        self._writers[k].write(
            step=progress.step,
            split="validation",
            loss=loss,
            accuracy=accuracy,
            seconds=sum(progress.seconds.values()),
        )

    def tested(self, training, k, test):
        step = training.cells[k].progress.best_step
        self._writers[k].write(step=step, split="test", loss=test.loss, accuracy=test.accuracy)

    def save(self, training):
        for writer, cell in zip(self._writers, training.cells, strict=True):
            writer.sync()
            cell.add(metrics_lines=writer.num_lines)


class SavedCheckpoints(Callback):
    """Saves `contents(training)`, the arrays and facts. Put it after what changes the progress."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        contents: Callable[[Training], tuple[dict[str, Any], dict[str, Any]]],
    ):
        self._checkpoints, self._contents = checkpoints, contents

    def save(self, training):
        if self._checkpoints.latest_step != training.step:
            groups, facts = self._contents(training)
            self._checkpoints.save(training.step, groups, {**facts, "numerics": numerics()})


class Display(Callback):
    """Shows the step with the means of the running cells' losses and rates."""

    def __init__(self, show: Show):
        self._show = show

    def advanced(self, training):
        cells = [training.cells[training.lanes[lane]] for lane in training.going()]
        losses = [cell.progress.train_loss for cell in cells]
        self._show(training.step, _mean(losses), _mean([cell.rate for cell in cells]))


class StopAtSignal(Callback):
    """Stops the training when `requested()` (see `stop_requests`) names a signal."""

    def __init__(self, requested: Callable[[], str]):
        self.stop_requested = requested


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
