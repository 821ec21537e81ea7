"""Training on disk: callbacks for metrics, checkpoints, a display and signals, and their use."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.environment import check_resumed, numerics
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.loop import Callback, Diverged, StopRequested, Training, Validate
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.program import Program
from lora_jax.train.progress import Show, ShowWith, show_progress
from lora_jax.train.rows import MetricRows, rate_at
from lora_jax.train.signals import Interrupted, stop_requests
from lora_jax.train.tracking import Link, Tracking


class MetricsFiles(MetricRows):
    """Writes each cell's metrics; before a checkpoint they are synced and their lines counted."""

    def __init__(self, writers: Sequence[MetricsWriter], unit: str):
        super().__init__(unit)
        self._writers = writers

    def row(self, training, k, split, values):
        self._writers[k].write(step=training.cells[k].progress.step, split=split, **values)

    def tested(self, training, k, test):
        step = training.cells[k].progress.best_step
        self._writers[k].write(step=step, split="test", loss=test.loss, accuracy=test.accuracy)

    def save(self, training):
        for writer, cell in zip(self._writers, training.cells, strict=True):
            writer.sync()
            cell.progress.metrics_lines = writer.num_lines


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
        good, rate = self._checkpoints.latest_step, rate_at(training, k, max(0, step - 1))
        saved = "no checkpoint was written yet"
        if good is not None:
            saved = f"the checkpoint of step {good} is kept"
        raise Diverged(
            f"{what} at step {step} (learning rate {rate:g}); {saved}. Lower optimizer.lr "
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a training on disk is shown, stopped and noted; nothing of it decides the result.

    `command` is what to tell the user to type after an interruption; `config_file`
    ("FILE.py[:arg]") is noted in the cards; `show_with` shows how far it is, if there is
    `progress`. `links` are to the trackers, which group runs by `group`.
    """

    command: str = ""
    config_file: str = ""
    callbacks: Sequence[Callback] = ()
    links: Sequence[Link] = ()
    group: str = ""
    progress: bool = True
    show_with: ShowWith = show_progress


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
    options: Options,
    tracking: Tracking,
    *,
    unit: str,
    started: float,
) -> dict[int, Evaluation]:
    """Trains to the end, from the latest checkpoint in `home`; `{cell: scores}` on `test`.

    Each cell's metrics are in its folder and in its tracker runs, and all is on the disk in the
    end. `unit` is what rates count. Raises `Interrupted`, after saving, at a signal or when a
    callback asks to stop.
    """
    num_steps = training.schedule.num_steps
    with (
        stop_requests() as requested,
        Checkpoints(home / "checkpoints") as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        _resume(training, checkpoints)
        writers = [
            stack.enter_context(
                MetricsWriter(folder, num_lines=cell.progress.metrics_lines, step=training.step)
            )
            for folder, cell in zip(folders, training.cells, strict=True)
        ]
        show = options.show_with(
            home.name, num_steps, start=training.step, enabled=options.progress, unit=unit
        )
        callbacks = [
            MetricsFiles(writers, unit),
            SavedCheckpoints(checkpoints),
            Display(stack.enter_context(show)),
            StopAtSignal(requested),
            tracking,
            *options.callbacks,
        ]
        tracking.begin(training)
        try:
            training.run(callbacks, started)
            found = training.test(test)
        except StopRequested as why:
            checkpoints.wait()
            raise Interrupted(
                f"stopped by {why} at step {training.step} of {num_steps}; all is saved in "
                f"{checkpoints.folder.parent}. To go on: {options.command}"
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
