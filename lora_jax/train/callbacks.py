"""Training on disk: callbacks for metrics, checkpoints, a display and signals, and their use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.loop import Callback, StopRequested, Training, Validate
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.numerics import check_resumed, numerics
from lora_jax.train.program import Program
from lora_jax.train.progress import Show
from lora_jax.train.signals import Interrupted


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

    def evaluated(self, training, k, values):
        progress = training.cells[k].progress
        self._writers[k].write(
            step=progress.step,
            split="validation",
            **values,
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


def validate_on(program: Program, batches: Iterable[Any]) -> Validate:
    """Evaluates each lane's loss and accuracy on `batches`."""

    def validate(trainable, frozen, watched):
        found = program.evaluate(trainable, frozen, watched(batches))
        return [{"loss": one.loss, "accuracy": one.accuracy} for one in found]

    return validate


def restored(
    checkpoints: Checkpoints, like: Callable[[dict], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]] | None:
    """The latest checkpoint's groups and facts, and what changed of `numerics` since."""
    changes: tuple[str, ...] = ()

    def checked(facts: dict[str, Any]) -> dict[str, Any]:
        # Before the arrays are compared: x64 changes their dtypes, and is the cause to name.
        nonlocal changes
        changes = check_resumed(facts.get("numerics", {}), checkpoints.folder)
        return like(facts)

    found = checkpoints.restore(checked)
    return None if found is None else (*found, changes)


def train_on_disk(
    training: Training,
    checkpoints: Checkpoints,
    folders: Sequence[Path],
    schedules: Sequence[Callable[[int], Any]],
    unit: str,
    test: Iterable[Any],
    show: contextlib.AbstractContextManager[Show],
    *,
    contents: Callable[[Training], tuple[dict[str, Any], dict[str, Any]]],
    more: Sequence[Callback],
    started: float,
    again: str,
) -> dict[int, Evaluation]:
    """Trains to the end, with each cell's metrics in its folder; `{cell: scores}` on `test`.

    All is on the disk then. Raises `Interrupted`, after saving, when a callback of `more` asks to
    stop; `again` says how to go on.
    """
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                MetricsWriter(folder, num_lines=cell.progress.metrics_lines, step=training.step)
            )
            for folder, cell in zip(folders, training.cells, strict=True)
        ]
        callbacks = [
            MetricsFiles(writers, schedules, unit),
            SavedCheckpoints(checkpoints, contents),
            Display(stack.enter_context(show)),
            *more,
        ]
        training.begin(callbacks, started)
        try:
            training.run()
            found = training.test(test)
        except StopRequested as why:
            checkpoints.wait()
            raise Interrupted(
                f"stopped by {why} at step {training.step} of "
                f"{training.schedule.num_steps}; all is saved in {checkpoints.folder.parent}. "
                f"To go on: {again}"
            ) from None
    checkpoints.wait()
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
