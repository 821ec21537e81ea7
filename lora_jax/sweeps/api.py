"""`lj.sweep`: many adapters trained at once on one frozen base, for anybody's model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.settings import OptimizerSettings
from lora_jax.sweeps.batches import OwnBatches, SharedBatches, num_elements
from lora_jax.sweeps.curves import Curves
from lora_jax.sweeps.memory import DoesNotFit, device_memory_bytes
from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.packed import PackTraining
from lora_jax.sweeps.plan import Planned, make_plan
from lora_jax.sweeps.program import PackedProgram, default_at_once
from lora_jax.sweeps.results import CellResult, SweepResults
from lora_jax.sweeps.runner import Runner, Spec
from lora_jax.sweeps.settings import CellSettings, read_cells, tuned_cells
from lora_jax.train.cell import Schedule
from lora_jax.train.loop import Callback, StopRequested
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.progress import show_progress


def sweep(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Sequence[Any] | Callable[[int], Iterable[Any]],
    cells: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
    tune: tuple[str, Sequence[Any]] | None = None,
    validation: Sequence[Any] = (),
    eval_every: int = 0,
    patience: int = 0,
    schedule: str = "constant",
    warmup_ratio: float = 0.0,
    clip_norm: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    axes: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    memory_bytes: int | None = None,
    at_once: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> SweepResults:
    """Trains every cell with AdamW; cells whose shapes agree train as one compiled program.

    Args:
      loss_fn: `loss_fn(params, batch) -> ()` of any JAX model; it need know nothing of adapters.
      params: the frozen base: dict, `nnx.State`, module tree; leaves that are no arrays
        (activations, flags) reach `loss_fn` as they are.
      batches: a sequence that all cells go through in order, over and over; or `batches(seed)`, an
        iterable of `num_steps` batches or more: each cell's own order, opened once, in which batch
        n has the same shapes for all.
      cells: dicts of `targets`, `rank`, `alpha`, `dropout`, `init` (see `LoRA`), `lr` (the peak
        rate), `weight_decay`, `seed`, `train` (parameters trained whole), `name`, and `method`:
        "lora" (default), "head", "bitfit", "full", or a `Method`.
      num_steps: optimizer steps of each cell.
      tune: a setting and its values, `("lr", (1e-4, 1e-3))`: each cell runs once for each, and
        `results.tuned()` says which is best on validation, with the basin.
      validation: batches for all; the mean of their losses chooses the trainable that is kept.
      eval_every: steps between evaluations on `validation`; 0 for one, after the last step.
      patience: evaluations without a better loss after which a cell stops; 0 for never.
      schedule, warmup_ratio, clip_norm, beta1, beta2, eps: as in `train.make_optimizer`; clipping
        is by the norm of each cell's own gradients, 0 for none.
      axes, aliases: as in `LoRA`.
      memory_bytes: what a program may hold; packs are narrowed until they fit, and a cell that does
        not fit alone fails. By default what the device has, or half of the host's memory.
      at_once: cells of a pack that are computed side by side, chunk after chunk in one program; 0
        for all. By default all, and 1 on CPU, which is faster there and needs less memory.
      progress: show a bar and print the plan.
      callbacks: are notified of what each pack does (`lora_jax.train.Callback`), and may stop it.

    Returns one result a cell. A cell that fails (a wrong setting, a loss that is not finite)
    has its `error`, and the others go on. What has finished is never thrown away: a later pack that
    cannot run, or Ctrl-C, leaves its cells with an `error`. Raises `RequestError` for what is wrong
    with the sweep as a whole.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> base = {"w": jnp.eye(4), "v": jnp.ones((4, 1))}
    >>> loss = lambda p, batch: jnp.mean((jnp.tanh(batch @ p["w"]) @ p["v"] - 1.0) ** 2)
    >>> cells = [{"targets": "w", "rank": r, "lr": 1e-2} for r in (1, 2)]
    >>> found = lj.sweep(loss, base, [jnp.ones((8, 4))], cells, num_steps=3, progress=False)
    >>> [row.trainable["w"]["a"].shape for row in found]
    [(4, 1), (4, 2)]
    """
    if num_steps < 1 or eval_every < 0 or patience < 0 or (at_once or 0) < 0:
        raise RequestError(
            f"num_steps={num_steps}, eval_every={eval_every}, patience={patience}, "
            f"at_once={at_once}: at least 1, 0, 0, 0"
        )
    if patience and not (validation and eval_every):
        raise RequestError(f"patience={patience} needs validation batches and eval_every")
    source = OwnBatches(batches) if callable(batches) else SharedBatches(batches)
    if tune is not None and not validation:
        raise RequestError(f"tune={tune!r} chooses on validation; give validation batches")
    cells, tuned = tuned_cells(cells, tune)
    named = read_cells(cells, axes=axes, aliases=aliases)
    optimizer = {
        "schedule": schedule,
        "warmup_ratio": warmup_ratio,
        "clip_norm": clip_norm,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
    }
    spec = _InMemory(
        lift(_of_shown(loss_fn)),
        trees.hide_static(params),
        source,
        [jax.tree.map(jnp.asarray, batch) for batch in validation],
        optimizer,
        Schedule(num_steps, eval_every, patience),
        at_once=default_at_once() if at_once is None else at_once,
        progress=progress,
        callbacks=callbacks,
    )
    runner = Runner(spec, memory_bytes or device_memory_bytes(), lambda line: None)
    try:
        runner.run(named)
    except (KeyboardInterrupt, StopRequested) as why:
        if not spec.trained:
            raise
        runner.take({cell.name: f"stopped by {str(why) or 'Ctrl-C'}" for cell in named})
    rows = []
    for cell in named:
        result = runner.results[cell.name]
        row = _refused(cell, result) if isinstance(result, str) else result
        rows.append(dataclasses.replace(row, group=tuned.get(row.name, "")))
    return SweepResults(rows, "\n".join(spec.lines), tune[0] if tune else "")


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
class _InMemory(Spec):
    """Cells of dicts on one model in memory; their results stay there too."""

    loss: Callable[[Any, Any], jax.Array]
    params: Any
    source: SharedBatches | OwnBatches
    validation: Sequence[Any]
    optimizer: Mapping[str, Any]
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
                *_loss_and_scores(group.pack, self.loss),
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
        return cell.method.optimizer(make_optimizer(settings, self.schedule.num_steps))

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


def _of_shown(loss_fn: Callable[[Any, Any], jax.Array]):
    """The user's loss, which sees the Python leaves (activations, flags) of its own tree."""

    @functools.wraps(loss_fn)
    def of_shown(params, batch):
        return loss_fn(trees.show_static(params), batch)

    return of_shown


def _loss_and_scores(pack: Pack, loss: Callable[[Any, Any], jax.Array]):
    """The user's loss as `PackedProgram` takes it: the batch counts as one example."""

    def loss_of(trainable, frozen, batch, key=None):
        value = loss(pack.bind(trainable, frozen, key=key), batch)
        return value, {"correct": jnp.zeros(()), "weight": jnp.ones(())}

    def scores_of(trainable, frozen, batch):
        return loss_of(trainable, frozen, batch)[0]

    return loss_of, scores_of


def _validation(program: PackedProgram, batches: Sequence[Any]):
    """Each cell's mean loss over `batches`, as `PackTraining` asks for it."""

    def validate(trainable, frozen, watched):
        if not batches:
            return None
        scores = [program.scores(trainable, frozen, batch) for batch in batches]
        means = np.mean(np.asarray(jax.device_get(scores), np.float64), axis=0)
        return [(float(loss), math.nan) for loss in means]

    return validate


def _refused(cell: CellSettings, why: str) -> CellResult:
    """The result of a cell that was never begun, or not brought to an end."""
    return CellResult(
        name=cell.name,
        settings=cell.settings,
        method=cell.method,
        losses=np.zeros(0, np.float32),
        validation=(),
        best_step=0,
        best_loss=None,
        trainable=None,
        num_trainable=0,
        stopped="",
        error=why,
        seconds=0.0,
        compile_seconds=0.0,
        pack=0,
        width=0,
    )
