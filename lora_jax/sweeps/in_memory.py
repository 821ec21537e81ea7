"""The engine of `lj.sweep`: cells of dicts on one model in memory, and their results."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.groups import make_packs
from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.packed import PackTraining
from lora_jax.sweeps.program import PackedProgram
from lora_jax.sweeps.results import CellResult
from lora_jax.sweeps.runner import DoesNotFit, Ready, Runner
from lora_jax.train.callbacks import Display
from lora_jax.train.cell import Cell, Schedule
from lora_jax.train.loop import Callback, StopRequested
from lora_jax.train.optimizer import make_optimizer, make_own_optimizer
from lora_jax.train.progress import Show, show_progress
from lora_jax.train.tracking import Link, TrackedCell, Tracking


class SharedBatches:
    """A sequence that all cells go through in order, over and over."""

    axis = None

    def __init__(self, batches: Sequence[Any]):
        if isinstance(batches, dict) or not batches:
            raise RequestError(
                f"batches is {'one dict' if batches else 'empty'}; give a sequence of batches, or "
                "a function of a seed"
            )
        self._batches = batches

    def widest(self, cells: Sequence[Cell]) -> Any:
        """The largest batch."""
        return _as_arrays(max(self._batches, key=num_elements))

    def at(self, step: int, cells: Sequence[Cell]) -> Any:
        """The batch of the step that comes after `step` others."""
        return _as_arrays(self._batches[step % len(self._batches)])


class OwnBatches:
    """Each cell's own order, `source(seed)`, opened once; batches have a leading axis of cells."""

    axis = 0

    def __init__(self, source: Callable[[int], Iterable[Any]]):
        self._source = source
        self._open: dict[str, Any] = {}

    def widest(self, cells: Sequence[Cell]) -> Any:
        """The shapes of the first batch of `cells`, taken from the first one's order."""
        first = self._next(cells[0], 0)
        self._open[cells[0].name] = itertools.chain([first], self._open[cells[0].name])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(cells), *leaf.shape), leaf.dtype),
            _as_arrays(first),
        )

    def at(self, step: int, cells: Sequence[Cell]) -> Any:
        """The next batches of these cells, stacked. Raises `RequestError` where one has ended."""
        each = [_as_arrays(self._next(cell, step)) for cell in cells]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def _next(self, cell: Cell, step: int) -> Any:
        if cell.name not in self._open:
            self._open[cell.name] = iter(self._source(cell.seed))
        batch = next(self._open[cell.name], None)
        if batch is None:
            raise RequestError(
                f"batches({cell.seed}) gave {step or 'no'} batches; a sweep needs one for each step"
            )
        return batch


def _as_arrays(batch: Any) -> Any:
    return jax.tree.map(jnp.asarray, batch)


def num_elements(batch: Any) -> int:
    """How many numbers a batch holds."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(batch))


@dataclasses.dataclass(kw_only=True)
class InMemory(Runner):
    """Cells of dicts on one model in memory; their results stay there too.

    `loss` and `metrics` take `(params, batch)` and are lifted; `lines` says which packs ran.
    """

    loss: Callable[[Any, Any], jax.Array]
    metrics: Callable[[Any, Any], Mapping[str, jax.Array]] | None
    params: Any
    source: SharedBatches | OwnBatches
    validation: Sequence[Any]
    tx: Callable[[Any], optax.GradientTransformation] | None
    schedule: Schedule
    at_once: int
    progress: bool
    callbacks: Sequence[Callback]
    links: Sequence[Link] = ()
    lines: list[str] = dataclasses.field(default_factory=list)
    _program: tuple[Any, PackedProgram] | None = None
    _trained: bool = False
    _stopped: str = ""
    _began: str = dataclasses.field(default_factory=lambda: _now())

    def run(self, cells):
        """Trains the cells; Ctrl-C and callbacks that stop a later pack leave what is finished."""
        try:
            super().run(cells)
        except (KeyboardInterrupt, StopRequested) as why:
            if not self._trained:
                raise
            stopped = RequestError(f"stopped by {str(why) or 'Ctrl-C'}")
            self.take({cell.name: stopped for cell in cells})

    def packs(self, cells):
        yield make_packs(cells, self.params)

    def ready(self, pack):
        # The parts of a pack share its program; one of another pack goes.
        if self._program is None or self._program[0] is not pack.union:
            program = PackedProgram(
                *_loss_and_scores(pack, self.loss, self.metrics),
                self._tx_of,
                self._tx_of(pack.cells[0]),
                batch_axis=self.source.axis,
                at_once=self.at_once,
            )
            self._program = (pack.union, program)
        frozen = pack.cells[0].method.init(jax.random.key(0), self.params)[1]
        return Ready(
            pack, self._program[1], lambda cell: self.params, frozen, self.source,
            lambda: max(self.validation, key=num_elements, default=None),
        )  # fmt: skip

    def _tx_of(self, cell: Cell) -> optax.GradientTransformation:
        settings = (cell.config.optimizer, self.schedule.num_steps)
        tx = (
            make_optimizer(*settings) if self.tx is None else make_own_optimizer(self.tx, *settings)
        )
        return cell.method.optimizer(tx)

    def train(self, pack, ready, needed):
        number = len(self.lines) + 1
        self.lines.append(f"pack {number}: {pack} ({needed / 2**20:,.4g} MiB)")
        if self.progress:
            print(self.lines[-1])
        num_steps = self.schedule.num_steps
        with (
            show_progress(f"pack {number}", num_steps, enabled=self.progress) as show,
            self._tracking(pack) as tracking,
        ):
            curves = Curves(pack, show)
            validate = _validation(ready.program, self.validation)
            training = PackTraining(ready, validate, self.schedule)
            tracking.begin(training)
            try:
                training.run([curves, tracking, *self.callbacks])
            except StopRequested as why:
                self._stopped = str(why)
                for lane in training.going():
                    training.cells[training.lanes[lane]].error = f"stopped by {why}"
            rows = curves.results(training, number)
            for k, row in enumerate(rows):
                if not row.error:
                    tracking.finish(k, _summary(row))
        self._trained = True
        return {row.name: row for row in rows}

    def _tracking(self, pack: Pack) -> Tracking:
        cells = [
            TrackedCell(cell.name, f"sweep-{self._began}", dict(cell.shown)) for cell in pack.cells
        ]
        # The user's loss says nothing of right answers, and a batch counts as one example.
        return Tracking(cells, self.links, "batches", without=("accuracy",))

    def between(self):
        if self._stopped:
            raise StopRequested(self._stopped)

    def failure(self, error):
        if isinstance(error, DoesNotFit):
            return error
        # What is wrong for all shows in the first pack; later, what is finished must not go.
        if not self._trained or isinstance(error, StopRequested):
            return None
        first_line = str(error).splitlines()[0] if str(error) else ""
        return RequestError(f"{type(error).__name__}: {first_line}")


def _now() -> str:
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def _summary(row: CellResult) -> dict[str, Any]:
    """What trackers have of a result, by the names that `track_on_disk` gives those of a card."""
    best = {} if row.best_loss is None else {"best/loss": row.best_loss, "best/step": row.best_step}
    return {**best, "steps": len(row.losses), "stopped": row.stopped}


def _loss_and_scores(pack: Pack, loss: Callable, metrics: Callable | None):
    """The user's loss as `PackedProgram` takes it: the batch counts as one example."""

    def loss_of(trainable, frozen, batch, key=None):
        value = loss(pack.bind(trainable, frozen, key=key), batch)
        return value, {"correct": jnp.zeros(()), "weight": jnp.ones(())}

    def scores_of(trainable, frozen, batch):
        params = pack.bind(trainable, frozen)
        own = {} if metrics is None else dict(metrics(params, batch))
        return {**own, "loss": loss(params, batch)}

    return loss_of, scores_of


def _validation(program: PackedProgram, batches: Sequence[Any]):
    """Each lane's means over `batches`, as `PackTraining` asks for them."""

    def validate(trainable, frozen, watched):
        if not batches:
            return None
        scores = [program.scores(trainable, frozen, batch) for batch in watched(batches)]
        values = {
            name: np.mean([np.asarray(one[name], np.float64) for one in scores], axis=0)
            for name in scores[0]
        }
        lanes = zip(*values.values(), strict=True)
        return [dict(zip(values, map(float, lane), strict=True)) for lane in lanes]

    return validate


class Curves(Display):
    """The curves of a pack's cells; shows the mean of their last losses."""

    def __init__(self, pack: Pack, show: Show):
        super().__init__(lambda step, loss, rate: show(step, loss, None))
        self._losses: list[list[float]] = [[] for _ in pack.cells]
        self._metrics: list[list[tuple[int, dict[str, float]]]] = [[] for _ in pack.cells]

    def stepped(self, training, k, rows):
        self._losses[k] += [row[1] for row in rows]

    def evaluated(self, training, k, values):
        self._metrics[k].append((training.step, dict(values)))

    def results(self, training: PackTraining, number: int) -> list[CellResult]:
        """One result per cell, in their order."""
        rows = []
        for k, cell in enumerate(training.cells):
            seconds = dict(cell.progress.seconds)
            evaluated = self._metrics[k]
            row = CellResult(
                name=cell.settings.name,
                settings=cell.settings.shown,
                method=cell.settings.method,
                losses=np.asarray(self._losses[k], np.float32),
                validation=tuple((step, values.pop("loss")) for step, values in evaluated),
                metrics=tuple(evaluated),
                best_step=cell.progress.best_step,
                best_loss=cell.progress.best_loss if evaluated else None,
                trainable=training.trainable_of(k),
                num_trainable=training.pack.counts[k],
                stopped=cell.progress.stopped,
                error=cell.error,
                compile_seconds=seconds.pop("compile", 0.0),
                seconds=sum(seconds.values()),
                pack=number,
                width=len(training.cells),
            )
            rows.append(row)
        return rows
