"""The spec of `lj.sweep`: cells of dicts on one model in memory, and what is kept of them there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.settings import OptimizerSettings
from lora_jax.sweeps.batches import OwnBatches, SharedBatches, num_elements
from lora_jax.sweeps.memory import DoesNotFit
from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.packed import PackTraining
from lora_jax.sweeps.plan import Planned, make_plan
from lora_jax.sweeps.program import PackedProgram
from lora_jax.sweeps.results import CellResult
from lora_jax.sweeps.runner import Spec
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.callbacks import Display
from lora_jax.train.cell import Schedule
from lora_jax.train.loop import Callback, StopRequested
from lora_jax.train.optimizer import make_optimizer, make_own_optimizer
from lora_jax.train.progress import Show, show_progress


@dataclasses.dataclass(frozen=True)
class _Ready:
    """What trains a group, as `Spec.ready` says."""

    plan: Planned
    program: PackedProgram
    frozen: Any
    batches: SharedBatches | OwnBatches
    params_of: Callable[[CellSettings], Any]
    evaluation: Any


@dataclasses.dataclass
class InMemory(Spec):
    """Cells of dicts on one model in memory; their results stay there too."""

    loss: Callable[[Any, Any], jax.Array]
    metrics: Callable[[Any, Any], Mapping[str, jax.Array]] | None
    params: Any
    source: SharedBatches | OwnBatches
    validation: Sequence[Any]
    optimizer: Mapping[str, Any]
    own_optimizer: Callable[[Any], optax.GradientTransformation] | None
    schedule: Schedule
    at_once: int
    progress: bool
    callbacks: Sequence[Callback]
    lines: list[str] = dataclasses.field(default_factory=list)
    trained: bool = False
    stopped: str = ""
    _program: tuple[Any, PackedProgram] | None = None

    def groups(self, cells):
        planned, refused = make_plan(cells, self.params)
        yield planned, refused

    def ready(self, group):
        # The parts of a group share its program; one of another group goes.
        if self._program is None or self._program[0] is not group.pack.union:
            program = PackedProgram(
                *_loss_and_scores(group.pack, self.loss, self.metrics),
                self._tx_of,
                self._tx_of(group.cells[0]),
                batch_axis=self.source.axis,
                at_once=self.at_once,
            )
            self._program = (group.pack.union, program)
        frozen = group.cells[0].method.init(jax.random.key(0), self.params)[1]
        largest = max(self.validation, key=num_elements, default=None)
        return _Ready(
            group, self._program[1], frozen, self.source, lambda cell: self.params, largest
        )

    def _tx_of(self, cell: CellSettings):
        own = {"lr": cell.lr, "weight_decay": cell.weight_decay}
        settings = OptimizerSettings(**self.optimizer, **own)
        make = make_optimizer
        if self.own_optimizer is not None:
            make = functools.partial(make_own_optimizer, self.own_optimizer)
        return cell.method.optimizer(make(settings, self.schedule.num_steps))

    def divide(self, group, parts):
        return [group.take(part) for part in parts]

    def train(self, group, ready, needed):
        number = len(self.lines) + 1
        self.lines.append(f"pack {number}: {group} ({needed / 2**20:,.4g} MiB)")
        if self.progress:
            print(self.lines[-1])
        num_steps = self.schedule.num_steps
        with show_progress(f"pack {number}", num_steps, enabled=self.progress) as show:
            curves = Curves(group, show)
            training = PackTraining(
                group,
                ready.program,
                [self.params] * len(group.cells),
                ready.frozen,
                self.source,
                _validation(ready.program, self.validation),
                self.schedule,
                [curves, *self.callbacks],
            )
            try:
                training.run()
            except StopRequested as why:
                self.stopped = str(why)
                for lane in training.going():
                    training.cells[training.lanes[lane]].error = f"stopped by {why}"
        self.trained = True
        return {row.name: row for row in curves.results(training, number)}

    def between(self, results):
        if self.stopped:
            raise StopRequested(self.stopped)

    def failure(self, error):
        if isinstance(error, DoesNotFit):
            return str(error)
        # What is wrong for all shows in the first pack; later, what is finished must not go.
        if not self.trained or isinstance(error, StopRequested):
            return None
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


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

    def __init__(self, plan: Planned, show: Show):
        super().__init__(lambda step, loss, rate: show(step, loss, None))
        self._losses: list[list[float]] = [[] for _ in plan.cells]
        self._validation: list[list[tuple[int, float]]] = [[] for _ in plan.cells]
        self._metrics: list[list[tuple[int, dict[str, float]]]] = [[] for _ in plan.cells]

    def stepped(self, training, k, rows):
        self._losses[k] += [row[1] for row in rows]

    def evaluated(self, training, k, values):
        own = dict(values)
        self._validation[k].append((training.step, own.pop("loss")))
        self._metrics[k].append((training.step, own))

    def results(self, training: PackTraining, number: int) -> list[CellResult]:
        """One result per cell, in their order."""
        return [
            CellResult(
                name=cell.settings.name,
                settings=cell.settings.settings,
                method=cell.settings.method,
                losses=np.asarray(self._losses[k], np.float32),
                validation=tuple(self._validation[k]),
                metrics=tuple(self._metrics[k]),
                best_step=cell.progress.best_step,
                best_loss=cell.progress.best_loss if self._validation[k] else None,
                trainable=training.trainable_of(k),
                num_trainable=training.plan.counts[k],
                stopped=cell.progress.stopped,
                error=cell.error,
                seconds=sum(cell.progress.seconds.values())
                - cell.progress.seconds.get("compile", 0.0),
                compile_seconds=cell.progress.seconds.get("compile", 0.0),
                pack=number,
                width=len(training.cells),
            )
            for k, cell in enumerate(training.cells)
        ]
