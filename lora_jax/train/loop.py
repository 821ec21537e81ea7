"""The training loop: cells in the lanes of one program; a run alone has one, a pack has many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.train.cell import Cell, Progress, Schedule, TrainingCell
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.program import Program
from lora_jax.train.state import TrainState

REPACK_EVERY = 50  # steps between chances to take ended cells out; at evaluations there is one too
EMPTY = -1
FEWEST_STEPS = 20  # a narrower program is not compiled for fewer steps than that
METRICS = ("loss", "correct", "weight", "grad_norm")  # of a step, as its program returns them


class StopRequested(Exception):
    """A callback asked to stop, for this reason; everything that must not be lost is saved."""


class Diverged(RequestError):
    """A loss, gradient or weight is not finite: running the cell again would end there too."""


class Callback:
    """Is notified of what a training does. The base class does nothing.

    `k` is a cell's number. The callbacks of a training are called in their order.
    """

    def stepped(self, training: Training, k: int, rows: Sequence[tuple[float, ...]]) -> None:
        """Steps of a cell were fetched: (step, loss, correct, weight, gradient norm) of each."""

    def logged(self, training: Training, k: int, values: dict[str, float]) -> None:
        """The means over a cell's steps since the last log."""

    def evaluated(self, training: Training, k: int, values: dict[str, float]) -> None:
        """A cell was evaluated on the validation split: its loss and other metrics."""

    def tested(self, training: Training, k: int, test: Evaluation) -> None:
        """The best trainable of a cell was evaluated on the test split."""

    def failed(self, training: Training, k: int, what: str, step: int) -> None:
        """A cell ended with an `error`, since `what` ("loss is nan") was not finite at `step`."""

    def advanced(self, training: Training) -> None:
        """A step was taken, or a batch of an evaluation was begun."""

    def save(self, training: Training) -> None:
        """A checkpoint is due."""

    def stop_requested(self) -> str:
        """Why to stop, "" to go on. Asked before each step and each batch of an evaluation."""
        return ""


# (trainable, frozen, watched) -> {"loss": …, …} of each lane, or None without a validation split.
# `watched(batches)` yields the batches as long as nothing asks to stop.
Watched = Callable[[Iterable[Any]], Iterator[Any]]
Validate = Callable[[Any, Any, Watched], Sequence[dict[str, float]] | None]


class Training:
    """Cells in training. `lanes[lane]` is the number of the cell in a lane, or `EMPTY` in lanes
    that fill a mesh's parts.

    `best` has a place for every cell, ended or not. What is due is decided from the step and the
    cells' progress alone, and cells change lanes only at evaluations or every `REPACK_EVERY` steps:
    a training that was saved at any step and restored does what an uninterrupted one does.
    `frozen_of(cells)` gives what the step takes as frozen for these cells, a lane each; `batches`
    has `at(step, settings)`.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        program: Program,
        state: TrainState,
        frozen_of: Callable[[Sequence[int]], Any],
        batches: Any,
        validate: Validate,
        schedule: Schedule,
    ):
        self.cells = [TrainingCell(cell, Progress(meshes=(program.mesh,))) for cell in cells]
        self.lanes = list(range(len(self.cells)))
        self.step, self.evaluated, self.saved = 0, 0, 0
        self.schedule, self.state, self.best = schedule, state, None
        self._program, self._batches = program, batches
        self._frozen_of, self._validate = frozen_of, validate
        self._keep_lanes(self.lanes)
        self._pending: list[dict[str, jax.Array]] = []
        self._callbacks: Sequence[Callback] = ()

    def restore(
        self, step: int, evaluated: int, lanes: Sequence[int], state: TrainState, best: Any
    ) -> None:
        """Goes on from a checkpoint; the caller restores the cells. It may be of another mesh."""
        self.step, self.evaluated, self.saved = step, evaluated, step
        self.lanes, self.state, self.best = list(lanes), state, best
        for cell in self.cells:
            cell.progress.move_to(self._program.mesh)
        self._keep_lanes([lane for lane, k in enumerate(self.lanes) if k != EMPTY])
        if best is not None:
            self.best = self._program.take("trainable", best, self._every_cell())

    def contents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays, by group, and the facts of a checkpoint."""
        raise NotImplementedError

    def like(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Shapes of the arrays that the checkpoint of these facts holds."""
        raise NotImplementedError

    def go_on_from(self, groups: dict, facts: dict[str, Any], changes: tuple[str, ...]) -> None:
        """Restores a checkpoint's `contents`; `changes` are those of `numerics` since."""
        raise NotImplementedError

    def run(self, callbacks: Sequence[Callback] = (), started: float | None = None) -> None:
        """Trains until every cell has ended. Raises `StopRequested`, after saving.

        `started` is when (`time.perf_counter`) the preparation began.
        """
        self._callbacks = callbacks
        self._mark = time.perf_counter() if started is None else started
        self._end_section("setup")
        while True:
            try:
                if self.step > self.evaluated and self._repack_due():
                    self._evaluate()
            except StopRequested:
                # The evaluation is not in the progress, so it is the first thing done on resuming.
                self._save()
                raise
            if self._save_due():
                self._save()
            if not self.going():
                return
            if why := self._stop_requested():
                self._save()
                raise StopRequested(why)
            self._take_step()
            if self.step % self.schedule.log_every == 0:
                self._log()
            self._notify("advanced")

    def test(self, batches: Iterable[Any]) -> dict[int, Evaluation]:
        """`{cell: scores}` on `batches` of the best trainables of the cells that did not fail."""
        good = [k for k, cell in enumerate(self.cells) if not cell.error]
        if not good:
            return {}
        frozen = self._frozen_of(self._every_cell())
        found = self._program.evaluate(self.best, frozen, self._watched(batches))
        self._end_section("evaluate", [self.cells[k] for k in good])
        for k in good:
            self._notify("tested", k, found[k])
        return {k: found[k] for k in good}

    def going(self) -> list[int]:
        """The lanes of the cells that have not ended."""
        return [lane for lane, k in enumerate(self.lanes) if k >= 0 and not self.cells[k].ended]

    def check_weights(self) -> None:
        """Fails the cells whose weights are not finite: a step's loss is from before its update."""
        finite = self._program.finite(self.state.trainable)
        for lane in self.going():
            if not finite[lane]:
                self._fail(lane, "a weight", math.nan, self.step)

    def _at(self, lane: int) -> TrainingCell:
        return self.cells[self.lanes[lane]]

    def _notify(self, event: str, *values: Any) -> None:
        for one in self._callbacks:
            getattr(one, event)(self, *values)

    def _stop_requested(self) -> str:
        return next(filter(None, (one.stop_requested() for one in self._callbacks)), "")

    def _watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if why := self._stop_requested():
                raise StopRequested(why)
            self._notify("advanced")
            yield batch

    def _end_section(self, kind: str, cells: Sequence[TrainingCell] = ()) -> None:
        """Adds the seconds of a timed section, which began where the last one ended, to `kind`.

        `cells`, by default those going, share them equally. Compiling is counted apart.
        """
        compiling = self._program.take_compile_seconds()
        now = time.perf_counter()
        passed, self._mark = max(0.0, now - self._mark - compiling), now
        cells = cells or [self._at(lane) for lane in self.going()] or self.cells
        for cell in cells:
            cell.progress.add_seconds(kind, passed / len(cells))
            cell.progress.add_seconds("compile", compiling / len(cells))

    def _take_step(self) -> None:
        batch = self._batches.at(self.step, self._members)
        self.state, metrics = self._program.step(self.state, self._frozen, batch)
        self._pending.append(metrics)
        self.step += 1

    def _evaluation_due(self) -> bool:
        every = self.schedule.eval_every
        return self.step == self.schedule.num_steps or bool(every and self.step % every == 0)

    def _repack_due(self) -> bool:
        # Not when a log is due: how often a training logs must not decide its rounding.
        return self._evaluation_due() or (len(self.lanes) > 1 and self.step % REPACK_EVERY == 0)

    def _save_due(self) -> bool:
        every = self.schedule.checkpoint_every
        due = bool(every) and (self.step % every == 0 or not self.going())
        return due and self.step != self.saved

    def _save(self) -> None:
        self._fetch()
        self._end_section("train")
        self._notify("save")
        self.saved = self.step
        self._end_section("save")

    def _log(self) -> None:
        self._fetch()
        self._end_section("train")
        for lane in self.going():
            if self._at(lane).progress.window:
                self._notify("logged", self.lanes[lane], self._at(lane).log())
        self._end_section("log")

    def _fetch(self) -> None:
        """Brings the pending steps' metrics to the host; a cell that is not finite fails."""
        fetched, self._pending = jax.device_get(self._pending), []
        by_lane = [[np.reshape(metrics[name], -1) for name in METRICS] for metrics in fetched]
        first = self.step - len(fetched) + 1
        for lane in self.going():
            rows, wrong = [], None
            for step, values in enumerate(by_lane, first):
                rows.append((step, *(float(value[lane]) for value in values)))
                # The loss is from before the step's update, the gradient is what goes into it.
                both = (("loss", rows[-1][1]), ("gradient norm", rows[-1][4]))
                if wrong := next((one for one in both if not math.isfinite(one[1])), None):
                    break
            self._notify("stepped", self.lanes[lane], rows)
            if rows:
                progress = self._at(lane).progress
                progress.window += tuple(rows)
                progress.step = int(rows[-1][0])
            if wrong:
                self._fail(lane, *wrong, int(rows[-1][0]))

    def _evaluate(self) -> None:
        self._fetch()
        self._end_section("train")
        if self._evaluation_due():
            self._validate_cells()
        self._repack()
        self.evaluated = self.step

    def _validate_cells(self) -> None:
        trainable, lanes = self.state.trainable, self.going()
        scores = self._validate(trainable, self._frozen, self._watched)
        # Without validation the last step is the best.
        values = scores or [{"loss": -float(self.step)}] * len(self.lanes)
        self.check_weights()
        better = np.zeros(len(self.lanes), bool)
        for lane in lanes:
            cell, loss = self._at(lane), values[lane]["loss"]
            if not cell.error and not math.isfinite(loss):
                self._fail(lane, "validation loss", loss, self.step)
            if not cell.error:
                accuracy = values[lane].get("accuracy", math.nan)
                cell.progress.evaluate(loss, accuracy, self.schedule)
                better[lane] = cell.progress.best_step == self.step
        count = self._program.padded(len(self.cells))
        cells = [count if k == EMPTY else k for k in self.lanes]  # what is beyond goes nowhere
        self.best = self._program.keep(self.best, trainable, cells, better, count)
        # The time goes to all that took part, those that end with it too.
        self._end_section("evaluate", [self._at(lane) for lane in lanes])
        for lane in lanes:
            cell = self._at(lane)
            if cell.progress.stopped and cell.progress.window:
                self._notify("logged", self.lanes[lane], cell.log())
            if scores and not cell.error:
                self._notify("evaluated", self.lanes[lane], values[lane])

    def _fail(self, lane: int, what: str, value: float, step: int) -> None:
        cell, cause = self._at(lane), "before any update; look at the data and the model"
        if step > 1 or what == "a weight":
            cause = f"learning rate {cell.settings.lr:g}; lower it"
        cell.error = f"{what} is {value} at step {step} ({cause})"
        self._notify("failed", self.lanes[lane], f"{what} is {value}", step)

    def _repack(self) -> None:
        """Takes ended cells out once half of the lanes are theirs: then a narrower program pays."""
        # By steps and the cells' own ends alone, so that the same sweep repacks the same way.
        going = self.going()
        left = self.schedule.num_steps - self.step
        if not going or 2 * len(going) > len(self.lanes) or left < FEWEST_STEPS:
            return
        if self._program.padded(len(going)) < len(self.lanes):
            self._keep_lanes(going)

    def _keep_lanes(self, lanes: Sequence[int]) -> None:
        """Keeps these lanes, and empty ones that fill them up."""
        cells = [self.lanes[lane] for lane in lanes]
        num_empty = self._program.padded(len(cells)) - len(cells)
        # An empty lane duplicates the last cell; its results are ignored.
        self.state = self._program.take("state", self.state, [*lanes, *[lanes[-1]] * num_empty])
        self.lanes = [*cells, *[EMPTY] * num_empty]
        members = [*cells, *[cells[-1]] * num_empty]
        self._members = [self.cells[k].settings for k in members]
        self._frozen = self._frozen_of(members)

    def _every_cell(self) -> list[int]:
        """All cells, ended or not, in their order, filled up."""
        count = len(self.cells)
        return [min(k, count - 1) for k in range(self._program.padded(count))]
