"""Training a pack: K cells in one program over one copy of the base."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.results import CellResult
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.build import keys_of
from lora_jax.train.state import TrainState
from lora_jax.train.step import step_function

FETCH_EVERY = 50  # steps between looks at the losses, where no evaluation asks for one


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all cells of a sweep share: how long, and when to look."""

    num_steps: int
    eval_every: int
    patience: int


@dataclasses.dataclass
class _Progress:
    """What one cell has done so far."""

    cell: CellSettings
    books: Bookkeeping = dataclasses.field(default_factory=Bookkeeping)
    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    trainable: Any = None
    error: str = ""
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return bool(self.books.stopped or self.error)


class PackTraining:
    """The cells of one pack under way.

    `loss(params, batch)` is a lifted scalar function, `tx_of(cell)` the optimizer of one cell (one
    structure for all; what differs is in its state), `batches(cells)` yields batches: shared by all
    cells, or with a leading axis K where `batch_axis` is 0.
    """

    def __init__(
        self,
        pack: Pack,
        cells: Sequence[CellSettings],
        params: Any,
        loss: Callable[[Any, Any], jax.Array],
        tx_of: Callable[[CellSettings], Any],
        *,
        batch_axis: int | None,
        validation: Sequence[Any],
        schedule: Schedule,
    ):
        self.pack = pack
        self.schedule = schedule
        self.progress = [_Progress(cell) for cell in cells]
        self.slots = list(range(len(cells)))  # which cell sits in each place of the leading axis
        self._validation = validation
        keys = [keys_of(cell.seed) for cell in cells]
        trainable, self.bundle = pack.init([key[1] for key in keys], params)
        own = [jax.tree.map(lambda leaf, k=k: leaf[k], trainable) for k in range(len(cells))]
        opt_states = [tx_of(cell).init(one) for cell, one in zip(cells, own, strict=True)]
        self.state = TrainState(
            step=jnp.zeros(len(cells), jnp.int32),
            trainable=trainable,
            opt_state=jax.tree.map(lambda *leaves: jnp.stack(leaves), *opt_states),
            key=jnp.stack([key[2] for key in keys]),
        )
        self.best = None
        self._compiled: dict[Any, Any] = {}

        def loss_of(trainable, bundle, batch, key=None):
            return loss(pack.bind(trainable, bundle, key=key), batch), {}

        def score_of(trainable, bundle, batch):
            return loss_of(trainable, bundle, batch)[0]

        axes = pack.bundle_axes
        step = step_function(loss_of, tx_of(cells[0]))
        self.step = jax.jit(jax.vmap(step, in_axes=(0, axes, batch_axis)), donate_argnums=0)
        self.score = jax.jit(jax.vmap(score_of, in_axes=(0, axes, None)))

    def compiled(self, batch: Any):
        """The step compiled for this batch's shapes and the cells that are left."""
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch)]
        key = (len(self.slots), *shapes)
        if key not in self._compiled:
            self._compiled[key] = self.step.lower(self.state, self.bundle, batch).compile()
        return self._compiled[key]

    def bytes_needed(self, batch: Any) -> int:
        """What the compiled step holds at once: arguments, temporaries, results not in place."""
        memory = self.compiled(batch).memory_analysis()
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept

    def run(self, batches: Callable[[Sequence[CellSettings]], Iterator[Any]], show) -> None:
        """Trains until every cell has ended; `show(step, loss)` is told of the way."""
        pending, stream = [], batches([progress.cell for progress in self.progress])
        mark = time.perf_counter()
        for step in range(1, self.schedule.num_steps + 1):
            batch = next(stream)
            self.state, metrics = self.compiled(batch)(self.state, self.bundle, batch)
            pending.append(metrics["loss"])
            looked = self._evaluation_due(step)
            if looked or len(pending) >= FETCH_EVERY:
                self._take(pending, step)
                pending = []
            if looked:
                self._evaluate(step)
            if looked or not pending:
                now = time.perf_counter()
                for place in self._going():
                    self._at(place).seconds += (now - mark) / max(1, len(self._going()))
                mark = now
                show(step, self._mean_loss())
                if not self._going():
                    return
                if self._repack():
                    stream = self._from(batches, step)

    def results(self, number: int) -> list[CellResult]:
        """One result a cell, in their order."""
        return [self._result(k, number) for k in range(len(self.progress))]

    def _result(self, k: int, number: int) -> CellResult:
        progress = self.progress[k]
        own = progress.trainable
        return CellResult(
            name=progress.cell.name,
            settings=progress.cell.given,
            method=progress.cell.method,
            losses=np.asarray(progress.losses, np.float32),
            validation=tuple(progress.validation),
            best_step=progress.books.best_step,
            best_loss=progress.books.best_loss if self._validation else None,
            trainable=None if own is None else self.pack.unpack(own, k),
            stopped=progress.books.stopped,
            error=progress.error,
            seconds=progress.seconds,
            pack=number,
            width=len(self.progress),
        )

    def _at(self, place: int) -> _Progress:
        return self.progress[self.slots[place]]

    def _going(self) -> list[int]:
        return [place for place in range(len(self.slots)) if not self._at(place).ended]

    def _evaluation_due(self, step: int) -> bool:
        every = self.schedule.eval_every
        return step == self.schedule.num_steps or bool(every and step % every == 0)

    def _take(self, pending: list[jax.Array], step: int) -> None:
        """Books the losses of the last steps; a cell whose loss is not a number ends there."""
        losses = np.stack(jax.device_get(pending))  # (steps, K)
        first = step - len(losses) + 1
        for place in self._going():
            progress, mine = self._at(place), losses[:, place]
            bad = np.flatnonzero(~np.isfinite(mine))
            progress.losses += mine[: bad[0] + 1 if bad.size else None].tolist()
            if bad.size:
                self._fail(place, f"loss is {mine[bad[0]]} at step {first + bad[0]}")

    def _evaluate(self, step: int) -> None:
        scores = [self.score(self.state.trainable, self.bundle, b) for b in self._validation]
        means = np.mean(np.asarray(jax.device_get(scores), np.float64), axis=0) if scores else None
        better = np.zeros(len(self.slots), bool)
        for place in self._going():
            progress = self._at(place)
            # Without validation the last step is the best: nothing chooses among them.
            loss = float(means[place]) if scores else -float(step)
            if not math.isfinite(loss):
                self._fail(place, f"validation loss is {loss} at step {step}")
                continue
            if scores:
                progress.validation.append((step, loss))
            books = dataclasses.replace(progress.books, step=step)
            progress.books = books.after_evaluation(
                loss, math.nan, patience=self.schedule.patience, num_steps=self.schedule.num_steps
            )
            better[place] = progress.books.best_step == step
        if self.best is None:
            self.best = jax.tree.map(jnp.copy, self.state.trainable)
        else:
            self.best = _choose(jnp.asarray(better), self.state.trainable, self.best)
        for place in range(len(self.slots)):
            progress = self._at(place)
            if progress.ended and progress.trainable is None and progress.books.best_step:
                progress.trainable = jax.tree.map(lambda leaf, k=place: leaf[k], self.best)

    def _fail(self, place: int, what: str) -> None:
        progress = self._at(place)
        progress.error = f"{what} (learning rate {progress.cell.lr:g}); lower lr"
        if self.best is not None and progress.books.best_step:
            progress.trainable = jax.tree.map(lambda leaf: leaf[place], self.best)

    def _repack(self) -> bool:
        """Takes ended cells out once half of the places are theirs: then a narrower program pays.

        The rule looks at nothing but the cells' own ends, so that the same sweep repacks the same.
        """
        going = self._going()
        if not going or 2 * len(going) > len(self.slots):
            return False
        places = jnp.asarray(going)
        take = lambda leaf: jnp.take(leaf, places, axis=0)  # noqa: E731
        self.state = jax.tree.map(take, self.state)
        self.best = None if self.best is None else jax.tree.map(take, self.best)
        data, frozen = self.bundle
        self.bundle = (jax.tree.map(take, data), frozen)
        self.slots = [self.slots[place] for place in going]
        return True

    def _from(self, batches, step: int) -> Iterator[Any]:
        stream = batches([self.progress[k].cell for k in self.slots])
        for _ in range(step):
            next(stream)
        return stream

    def _mean_loss(self) -> float | None:
        last = [self._at(place).losses[-1] for place in self._going() if self._at(place).losses]
        return float(np.mean(last)) if last else None


@jax.jit
def _choose(better: jax.Array, new: Any, old: Any) -> Any:
    """`new` for the cells that are better, `old` for the rest; leaves have a leading axis K."""

    def choose(x, y):
        return jnp.where(better.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, new, old)
