"""Training a pack: K cells in one program over one copy of the base, each with its own end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.program import Program
from lora_jax.sweeps.results import CellResult
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.bookkeeping import Bookkeeping

FETCH_EVERY = 50  # steps between looks at the losses, where no evaluation asks for one
FEWEST_STEPS = 20  # a narrower program is not compiled for fewer steps than that


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all cells of a sweep share: how long, when to look, and how long to hope."""

    num_steps: int
    eval_every: int
    patience: int


@dataclasses.dataclass
class _Cell:
    """What one cell has done so far."""

    settings: CellSettings
    books: Bookkeeping = dataclasses.field(default_factory=Bookkeeping)
    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    trainable: Any = None
    error: str = ""
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return bool(self.books.stopped or self.error)


class PackTraining:
    """The cells of one pack under way. `slots[place]` is the cell in a place of the axis K."""

    def __init__(
        self,
        plan: Planned,
        program: Program,
        params: Any,
        frozen: Any,
        batches: Any,
        validation: Sequence[Any],
        schedule: Schedule,
    ):
        self.plan = plan
        self.schedule = schedule
        self.cells = [_Cell(settings) for settings in plan.cells]
        self.slots = list(range(len(self.cells)))
        self._program, self._batches, self._validation = program, batches, validation
        self.state = program.init(plan.pack, plan.cells, params)
        self._frozen = (plan.pack.data(), frozen)
        self._best: Any = None

    def run(self, show) -> None:
        """Trains until every cell has ended; `show(step, loss)` is told of the way."""
        pending: list[dict[str, jax.Array]] = []
        self._share_compilation(self._going())  # of finding out how many fit
        mark = time.perf_counter()
        for step in range(1, self.schedule.num_steps + 1):
            batch = self._batches.at(step - 1, [self.plan.cells[k] for k in self.slots])
            self.state, metrics = self._program.step(self.state, self._frozen, batch)
            pending.append(metrics)
            look = self._evaluation_due(step)
            if not look and len(pending) < FETCH_EVERY:
                continue
            paying = self._going()
            self._take(pending, step)
            pending = []
            if look:
                self._evaluate(step)
            mark = self._share(mark, paying)
            show(step, self._mean_loss())
            if not self._going():
                return
            self._repack(step)

    def results(self, number: int) -> list[CellResult]:
        """One result a cell, in their order."""
        return [
            CellResult(
                name=cell.settings.name,
                settings=cell.settings.settings,
                method=cell.settings.method,
                losses=np.asarray(cell.losses, np.float32),
                validation=tuple(cell.validation),
                best_step=cell.books.best_step,
                best_loss=cell.books.best_loss if self._validation else None,
                trainable=None
                if cell.trainable is None
                else self.plan.pack.unpack(cell.trainable, k),
                num_trainable=self.plan.counts[k],
                stopped=cell.books.stopped,
                error=cell.error,
                seconds=cell.seconds,
                compile_seconds=cell.compile_seconds,
                pack=number,
                width=len(self.cells),
            )
            for k, cell in enumerate(self.cells)
        ]

    def _at(self, place: int) -> _Cell:
        return self.cells[self.slots[place]]

    def _going(self) -> list[int]:
        return [place for place in range(len(self.slots)) if not self._at(place).ended]

    def _evaluation_due(self, step: int) -> bool:
        every = self.schedule.eval_every
        return step == self.schedule.num_steps or bool(every and step % every == 0)

    def _take(self, pending: list[dict[str, jax.Array]], step: int) -> None:
        """Books the losses of the last steps; a cell whose loss is not a number ends there."""
        fetched = jax.device_get(pending)
        first = step - len(fetched) + 1
        for place in self._going():
            cell = self._at(place)
            for number, metrics in enumerate(fetched, first):
                loss, norm = float(metrics["loss"][place]), float(metrics["grad_norm"][place])
                cell.losses.append(loss)
                # The loss is from before the step's update, the gradient is what goes into it.
                what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
                if not math.isfinite(value):
                    self._fail(place, what, value, number)
                    break

    def _evaluate(self, step: int) -> None:
        trainable = self.state.trainable
        scores = [self._program.score(trainable, self._frozen, b) for b in self._validation]
        means = np.mean(np.asarray(jax.device_get(scores), np.float64), axis=0) if scores else None
        better = np.zeros(len(self.slots), bool)
        for place in self._going():
            cell = self._at(place)
            # Without validation the last step is the best: nothing chooses among them.
            loss = -float(step) if means is None else float(means[place])
            if not math.isfinite(loss):
                self._fail(place, "validation loss", loss, step)
                continue
            if means is not None:
                cell.validation.append((step, loss))
            books = dataclasses.replace(cell.books, step=step)
            cell.books = books.after_evaluation(
                loss, math.nan, patience=self.schedule.patience, num_steps=self.schedule.num_steps
            )
            better[place] = cell.books.best_step == step
        if self._best is None:
            self._best = jax.tree.map(jnp.copy, trainable)
        else:
            self._best = _choose(jnp.asarray(better), trainable, self._best)
        for place in range(len(self.slots)):
            if self._at(place).books.stopped:
                self._keep_best(place)

    def _fail(self, place: int, what: str, value: float, step: int) -> None:
        cell = self._at(place)
        cause = (
            f"learning rate {cell.settings.lr:g}; lower lr"
            if step > 1
            else "before any update; look at the data and the model"
        )
        cell.error = f"{what} is {value} at step {step} ({cause})"
        self._keep_best(place)

    def _keep_best(self, place: int) -> None:
        cell = self._at(place)
        if cell.trainable is None and cell.books.best_step:
            cell.trainable = jax.tree.map(lambda leaf: leaf[place], self._best)

    def _repack(self, step: int) -> None:
        """Takes ended cells out once half of the places are theirs: then a narrower program pays.

        The rule looks at nothing but steps and the cells' own ends, so that the same sweep repacks
        the same way.
        """
        going = self._going()
        left = self.schedule.num_steps - step
        if 2 * len(going) > len(self.slots) or left < FEWEST_STEPS:
            return
        places = jnp.asarray(going)
        data, frozen = self._frozen
        self.state, self._best, data = jax.tree.map(
            lambda leaf: jnp.take(leaf, places, axis=0), (self.state, self._best, data)
        )
        self._frozen = (data, frozen)
        self.slots = [self.slots[place] for place in going]

    def _share(self, mark: float, paying: list[int]) -> float:
        """Books the time since `mark` in equal parts to the cells that were at work in it."""
        compiling = self._share_compilation(paying)
        now = time.perf_counter()
        for place in paying:
            self._at(place).seconds += (now - mark - compiling) / len(paying)
        return now

    def _share_compilation(self, paying: list[int]) -> float:
        seconds = self._program.take_compile_seconds()
        for place in paying:
            self._at(place).compile_seconds += seconds / len(paying)
        return seconds

    def _mean_loss(self) -> float | None:
        last = [self._at(place).losses[-1] for place in self._going()]
        return float(np.mean(last)) if last else None


@jax.jit
def _choose(better: jax.Array, new: Any, old: Any) -> Any:
    """`new` for the cells that are better, `old` for the rest; leaves have a leading axis K."""

    def choose(x, y):
        return jnp.where(better.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, new, old)
