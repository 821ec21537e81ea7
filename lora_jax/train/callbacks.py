"""Training on disk: callbacks for metrics, checkpoints, a display and signals, and their use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.loop import Callback, Diverged, StopRequested, Training, Validate
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.numerics import check_resumed, numerics
from lora_jax.train.optimizer import make_schedule
from lora_jax.train.program import Program
from lora_jax.train.progress import Show
from lora_jax.train.signals import Interrupted


class MetricsFiles(Callback):
    """Writes each cell's metrics; before a checkpoint they are synced and their lines counted.

    `unit` is what is trained per second.
    """

    def __init__(self, writers: Sequence[MetricsWriter], training: Training, unit: str):
        self._writers, self._unit = writers, unit
        num_steps = training.schedule.num_steps
        self._rates = [
            make_schedule(cell.settings.config.optimizer, num_steps) for cell in training.cells
        ]

    def logged(self, training, k, values):
        cell = training.cells[k]
        rate = float(self._rates[k](cell.progress.step - 1))
        more = {"lr": rate, f"{self._unit}_per_s": cell.rate}
        self._write(training, k, "train", {**values, **more})

    def evaluated(self, training, k, values):
        self._write(training, k, "validation", values)

    def tested(self, training, k, test):
        step = training.cells[k].progress.best_step
        self._writers[k].write(step=step, split="test", loss=test.loss, accuracy=test.accuracy)

    def save(self, training):
        for writer, cell in zip(self._writers, training.cells, strict=True):
            writer.sync()
            cell.progress.metrics_lines = writer.num_lines

    def _write(self, training: Training, k: int, split: str, values: dict[str, Any]) -> None:
        progress = training.cells[k].progress
        seconds = sum(progress.seconds.values())
        self._writers[k].write(step=progress.step, split=split, **values, seconds=seconds)


class SavedCheckpoints(Callback):
    """Saves the training's `contents`. Put it after what changes the progress.

    A run alone ends where its cell failed, before anything more is saved.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def save(self, training):
        if self._checkpoints.latest_step != training.step:
            groups, facts = training.contents()
            self._checkpoints.save(training.step, groups, {**facts, "numerics": numerics()})

    def failed(self, training, k, what, step):
        if len(training.cells) > 1:
            return
        with contextlib.suppress(RequestError):
            self._checkpoints.wait()
        good, config = self._checkpoints.latest_step, training.cells[k].settings.config
        rate = make_schedule(config.optimizer, training.schedule.num_steps)(max(0, step - 1))
        saved = "no checkpoint was written yet"
        if good is not None:
            saved = f"the checkpoint of step {good} is kept"
        raise Diverged(
            f"{what} at step {step} (learning rate {float(rate):g}); {saved}. Lower optimizer.lr "
            "or optimizer.clip_norm and train in another workdir"
        )


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


def train_on_disk(
    training: Training,
    home: Path,
    folders: Sequence[Path],
    test: Iterable[Any],
    show: Callable[..., contextlib.AbstractContextManager[Show]],
    *,
    unit: str,
    more: Sequence[Callback],
    started: float,
    again: str,
) -> dict[int, Evaluation]:
    """Trains to the end, from the latest checkpoint in `home`; `{cell: scores}` on `test`.

    Each cell's metrics are in its folder, and all is on the disk in the end. `show(name, num_steps,
    start=…)` shows the way. Raises `Interrupted`, after saving, when a callback of `more` asks to
    stop; `again` says how to go on.
    """
    num_steps = training.schedule.num_steps
    with Checkpoints(home / "checkpoints") as checkpoints, contextlib.ExitStack() as stack:
        _resume(training, checkpoints)
        writers = [
            stack.enter_context(
                MetricsWriter(folder, num_lines=cell.progress.metrics_lines, step=training.step)
            )
            for folder, cell in zip(folders, training.cells, strict=True)
        ]
        shown = stack.enter_context(show(home.name, num_steps, start=training.step))
        files = [MetricsFiles(writers, training, unit), SavedCheckpoints(checkpoints)]
        training.begin([*files, Display(shown), *more], started)
        try:
            training.run()
            found = training.test(test)
        except StopRequested as why:
            checkpoints.wait()
            raise Interrupted(
                f"stopped by {why} at step {training.step} of {num_steps}; all is saved in "
                f"{checkpoints.folder.parent}. To go on: {again}"
            ) from None
        checkpoints.wait()
        return found


def _resume(training: Training, checkpoints: Checkpoints) -> None:
    """Goes on from the latest checkpoint, if there is one."""
    changes: tuple[str, ...] = ()

    def like(facts: dict[str, Any]) -> dict[str, Any]:
        # Before the arrays are compared: x64 changes their dtypes, and is the cause to name.
        nonlocal changes
        changes = check_resumed(facts.get("numerics", {}), checkpoints.folder)
        return training.like(facts)

    found = checkpoints.restore(like)
    if found is not None:
        training.go_on_from(*found, changes)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
