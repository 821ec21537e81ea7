"""Training a pack: K cells in one program over one copy of the base, each with its own end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweeps.keeping import Keeper, PackedCell, Schedule
from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.program import Program, with_places
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.run import StopRequested
from lora_jax.train.state import TrainState

REPACK_EVERY = 50  # steps between chances to take ended cells out; at evaluations there is one too
EMPTY = -1
FEWEST_STEPS = 20  # a narrower program is not compiled for fewer steps than that


# (trainable, frozen) with an axis of cells -> (loss, accuracy) of each, or None: nothing to look at
Validate = Callable[[Any, Any], Sequence[tuple[float, float]] | None]


class PackTraining:
    """The cells of one pack under way. `slots[place]` is the cell in a place of the axis of cells;
    `EMPTY` in those that make their number a multiple of the mesh's parts.

    `best` has a place for every cell, ended or not. What is due is decided from `step` and
    `looked` alone, and the cells' places change at looks only, so that a pack that was saved at any
    step and restored does what one that was not does.
    """

    def __init__(
        self,
        plan: Planned,
        program: Program,
        state: TrainState,
        frozen: Any,
        batches: Any,
        validate: Validate,
        schedule: Schedule,
        keeper: Keeper,
    ):
        self.plan = plan
        self.schedule = schedule
        books = Bookkeeping().on_mesh(program.mesh)
        self.cells = [PackedCell(settings, books) for settings in plan.cells]
        self.slots = list(range(len(self.cells)))
        self.step, self.looked, self.saved = 0, 0, 0
        self.state = state
        self.best: Any = None
        self._program, self._batches = program, batches
        self._validate, self._keeper = validate, keeper
        self._base = frozen
        self._keep_places(self.slots)
        self._pending: list[dict[str, jax.Array]] = []
        self._mark = time.perf_counter()

    def begin(self, keeper: Keeper, started: float) -> None:
        """Who is told from here on, and when (`time.perf_counter`) its preparation began."""
        self._keeper, self._mark = keeper, started

    def run(self) -> None:
        """Trains until every cell has ended. Raises `StopRequested`, after saving."""
        self.lap("setup")
        while True:
            try:
                if self._look_due():
                    self._look()
            except StopRequested:
                # The look is not booked, so it is the first thing done on resuming.
                self.save()
                raise
            if self._save_due():
                self.save()
            if not self.going():
                return
            if self._keeper.stop_requested():
                self.save()
                raise StopRequested
            self._take_step()

    def going(self) -> list[int]:
        """The places of the cells that have not ended."""
        return [place for place, k in enumerate(self.slots) if k >= 0 and not self.cells[k].ended]

    def save(self) -> None:
        """Has the keeper save the pack as it is."""
        self._fetch()
        self.lap("train")
        self._keeper.save(self)
        self.saved = self.step
        self.lap("save")

    def groups(self) -> dict[str, Any]:
        """The arrays of a checkpoint."""
        return {"state": self.state, **({} if self.best is None else {"best": self.best})}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its arrays, as JSON values."""
        cells = [{"books": cell.books.to_json(), "error": cell.error} for cell in self.cells]
        return {
            "step": self.step, "looked": self.looked, "slots": self.slots, "cells": cells,
            "num_best": self._program.padded(len(self.cells)),
        }  # fmt: skip

    def like(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Shapes of the arrays that the checkpoint of these facts holds."""
        num_best = facts.get("num_best", len(self.cells))
        return {
            "state": with_places(self.state, len(facts["slots"])),
            "best": with_places(self.state.trainable, num_best),
        }

    def restore(self, groups: dict[str, Any], facts: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.step, self.looked = facts["step"], facts["looked"]
        self.saved, self.slots = self.step, list(facts["slots"])
        self.state, self.best = groups["state"], groups.get("best")
        for cell, told in zip(self.cells, facts["cells"], strict=True):
            books = Bookkeeping.from_json(told["books"])
            cell.books, cell.error = books.on_mesh(self._program.mesh), told["error"]
        # It may have been saved on another mesh.
        self._keep_places([place for place, k in enumerate(self.slots) if k != EMPTY])
        if self.best is not None:
            self.best = self._program.take("trainable", self.best, self._all_places())

    def trainable_of(self, k: int) -> Any:
        """Cell k's best trainable, at its own rank and targets; None if there never was one."""
        if not self.cells[k].books.best_step:
            return None
        return self.plan.pack.unpack(_cell(self.best, k), k)

    def best_of_all(self) -> tuple[Any, Any]:
        """`(trainable, frozen)` for the scores of all cells' best; what is beyond them fills up."""
        return self.best, self._frozen_of(self._all_places())

    def lap(self, kind: str, cells: Sequence[PackedCell] = ()) -> None:
        """Books the time since the last lap under `kind`, in equal parts, to `cells`.

        By default to those at work. What went into compiling is booked apart.
        """
        compiling = self._program.take_compile_seconds()
        now = time.perf_counter()
        passed, self._mark = max(0.0, now - self._mark - compiling), now
        cells = cells or [self._at(place) for place in self.going()] or self.cells
        for cell in cells:
            seconds = dict(cell.books.seconds)
            for name, value in ((kind, passed), ("compile", compiling)):
                seconds[name] = seconds.get(name, 0.0) + value / len(cells)
            cell.books = dataclasses.replace(cell.books, seconds=seconds)

    def mean_loss(self) -> float | None:
        """The mean of the running cells' last training losses that are known."""
        losses = [self._at(place).books.train_loss for place in self.going()]
        known = [loss for loss in losses if loss is not None]
        return float(np.mean(known)) if known else None

    def _at(self, place: int) -> PackedCell:
        return self.cells[self.slots[place]]

    def _take_step(self) -> None:
        batch = self._batches.at(self.step, [self.plan.cells[k] for k in self._members])
        self.state, metrics = self._program.step(self.state, self._frozen, batch)
        self._pending.append(metrics)
        self.step += 1
        self._keeper.show(self)

    def _evaluation_due(self) -> bool:
        every = self.schedule.eval_every
        return self.step == self.schedule.num_steps or bool(every and self.step % every == 0)

    def _look_due(self) -> bool:
        return self.step > self.looked and (
            self.step % self.schedule.log_every == 0 or self._repack_due()
        )

    def _repack_due(self) -> bool:
        # Not when logging alone is due: how often a run logs must not decide its rounding.
        return self.step % REPACK_EVERY == 0 or self._evaluation_due()

    def _save_due(self) -> bool:
        every = self.schedule.checkpoint_every
        due = bool(every) and (self.step % every == 0 or not self.going())
        return due and self.step != self.saved

    def _look(self) -> None:
        self._fetch()
        self.lap("train")
        if self.step % self.schedule.log_every == 0:
            for place in self.going():
                self._log(place)
        self.lap("log")
        if self._evaluation_due():
            self._evaluate()
        if self._repack_due():
            self._repack()
        self.looked = self.step

    def _fetch(self) -> None:
        """Brings the pending steps' metrics to the host; a cell that is no number ends there."""
        fetched, self._pending = jax.device_get(self._pending), []
        first = self.step - len(fetched) + 1
        for place in self.going():
            rows, wrong = [], None
            for step, metrics in enumerate(fetched, first):
                names = ("loss", "correct", "weight", "grad_norm")
                row = (step, *(float(metrics[name][place]) for name in names))
                rows.append(row)
                # The loss is from before the step's update, the gradient is what goes into it.
                wrong = next(
                    (
                        (what, value, step)
                        for what, value in (("loss", row[1]), ("gradient norm", row[4]))
                        if not math.isfinite(value)
                    ),
                    None,
                )
                if wrong:
                    break
            cell = self._at(place)
            self._keeper.stepped(self.slots[place], rows)
            step = int(rows[-1][0]) if rows else cell.books.step
            cell.books = dataclasses.replace(
                cell.books, window=cell.books.window + tuple(rows), step=step
            )
            if wrong:
                self._fail(place, *wrong)

    def _log(self, place: int) -> None:
        cell = self._at(place)
        if cell.books.window:
            cell.books, values = cell.books.after_logging()
            self._keeper.logged(self, self.slots[place], values)

    def _evaluate(self) -> None:
        trainable = self.state.trainable
        scores = self._validate(trainable, self._frozen)
        # The time goes to all that took part, those that end with it too.
        places = self.going()
        self.lap("evaluate")
        better = np.zeros(len(self.slots), bool)
        finite = jax.device_get(_finite_cells(trainable))
        for place in places:
            if not finite[place]:
                # The loss was from before the update that did this.
                self._fail(place, "a weight", math.nan, self.step)
                continue
            cell = self._at(place)
            # Without validation the last step is the best: nothing chooses among them.
            loss, accuracy = (-float(self.step), math.nan) if scores is None else scores[place]
            if not math.isfinite(loss):
                self._fail(place, "validation loss", loss, self.step)
                continue
            schedule = self.schedule
            cell.books = cell.books.after_evaluation(
                loss, accuracy, patience=schedule.patience, num_steps=schedule.num_steps
            )
            better[place] = cell.books.best_step == self.step
            if cell.books.stopped:
                self._log(place)
            if scores is not None:
                self._keeper.validated(self, self.slots[place], loss, accuracy)
        # Beyond the last: what is kept of an empty place goes nowhere.
        count = self._program.padded(len(self.cells))
        slots = [count if k == EMPTY else k for k in self.slots]
        self.best = self._program.keep(self.best, trainable, slots, better, count)

    def _fail(self, place: int, what: str, value: float, step: int) -> None:
        cell = self._at(place)
        cause = (
            f"learning rate {cell.settings.lr:g}; lower it"
            if step > 1 or what == "a weight"
            else "before any update; look at the data and the model"
        )
        cell.error = f"{what} is {value} at step {step} ({cause})"

    def _repack(self) -> None:
        """Takes ended cells out once half of the places are theirs: then a narrower program pays.

        The rule looks at nothing but steps and the cells' own ends, so that the same sweep repacks
        the same way.
        """
        going = self.going()
        left = self.schedule.num_steps - self.step
        if not going or 2 * len(going) > len(self.slots) or left < FEWEST_STEPS:
            return
        if self._program.padded(len(going)) < len(self.slots):
            self._keep_places(going)

    def _keep_places(self, places: Sequence[int]) -> None:
        """These places are the axis of cells from here on, and empty ones that fill it up."""
        slots = [self.slots[place] for place in places]
        num_empty = self._program.padded(len(slots)) - len(slots)
        # An empty place goes on as the last cell does, and nobody looks at it.
        self.state = self._program.take("state", self.state, [*places, *[places[-1]] * num_empty])
        self.slots = [*slots, *[EMPTY] * num_empty]
        self._members = [*slots, *[slots[-1]] * num_empty]
        self._frozen = self._frozen_of(self._members)

    def _frozen_of(self, cells: Sequence[int]) -> tuple[Any, Any]:
        return self._program.take("data", self.plan.pack.data(), cells), self._base

    def _all_places(self) -> list[int]:
        """Of all cells, ended or not, in their order, filled up."""
        count = len(self.cells)
        return [min(place, count - 1) for place in range(self._program.padded(count))]


@jax.jit
def _cell(tree: Any, k: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[k], tree)


@jax.jit
def _finite_cells(trainable: Any) -> jax.Array:
    """(places,) whether all weights of each cell are finite."""
    leaves = jax.tree.leaves(trainable)
    each = [jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in leaves]
    return jnp.stack(each).all(axis=0)
