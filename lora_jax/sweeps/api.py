"""`lj.sweep`: many adapters trained at once on one frozen base, for anybody's model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.settings import OptimizerSettings
from lora_jax.sweeps.in_memory import InMemory, OwnBatches, SharedBatches
from lora_jax.sweeps.program import default_at_once
from lora_jax.sweeps.results import CellResult, SweepResults
from lora_jax.sweeps.runner import device_memory_bytes
from lora_jax.sweeps.settings import read_cells, tuned_cells
from lora_jax.trackers.base import Tracker
from lora_jax.train.cell import Cell, Schedule
from lora_jax.train.loop import Callback
from lora_jax.train.tracking import make_links


def sweep(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Sequence[Any] | Callable[[int], Iterable[Any]],
    cells: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
    tune: tuple[str, Sequence[Any]] | None = None,
    validation: Sequence[Any] = (),
    metrics: Callable[[Any, Any], Mapping[str, jax.Array]] | None = None,
    eval_every: int = 0,
    patience: int = 0,
    schedule: str = "constant",
    warmup_ratio: float = 0.0,
    clip_norm: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    tx: Callable[[Any], optax.GradientTransformation] | None = None,
    axes: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    memory_bytes: int | None = None,
    at_once: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Tracker] = (),
) -> SweepResults:
    """Trains every cell with AdamW or `tx`; cells whose shapes agree train as one compiled program.

    Args:
      loss_fn: `loss_fn(params, batch) -> ()` of any JAX model; it need know nothing of adapters.
      params: the frozen base: dict, `nnx.State`, module tree; leaves that are no arrays
        (activations, flags) reach `loss_fn` as they are.
      batches: a sequence that all cells go through in order, over and over; or `batches(seed)`, an
        iterable of `num_steps` batches or more: each cell's own order, opened once, in which batch
        n has the same shapes for all.
      cells: dicts of `targets`, `rank`, `alpha`, `dropout`, `init` (see `LoRA`), `lr` (the peak
        learning rate), `head_lr` (that of parameters under head/), `lr_by_path` (`{expression:
        learning rate}`, such as `{".*/b": 1e-2}`), `weight_decay`, `seed`, `train` (parameters
        trained whole), `name`, and `method`: "lora" (default), "head", "bitfit", "full", or a
        `Method`.
      num_steps: optimizer steps of each cell.
      tune: a setting and its values, `("lr", (1e-4, 1e-3))`: each cell runs once for each, and
        `results.tuned()` says which is best on validation, with the basin.
      validation: batches for all; the mean of their losses chooses which trainable is returned.
      metrics: `metrics(params, batch) -> {name: ()}`, more numbers of the validation batches; their
        means are each result's `metrics`.
      eval_every: steps between evaluations on `validation`; 0 for one, after the last step.
      patience: evaluations without a better loss after which a cell stops; 0 for never.
      schedule, warmup_ratio, clip_norm, beta1, beta2, eps: as in `train.make_optimizer`; clipping
        is by the norm of each cell's own gradients, 0 for none.
      tx: another optimizer than AdamW, as a function of the learning rate (`optax.lion`, or `lambda
        rate: optax.sgd(rate, momentum=0.9)`), after clipping and with the schedule's rate. Weight
        decay is its own then.
      axes, aliases: as in `LoRA`.
      memory_bytes: what a program may hold; packs are narrowed until they fit, and a cell that does
        not fit alone fails. By default what the device has, or half of the host's memory.
      at_once: cells of a pack that are computed side by side, chunk after chunk in one program; 0
        for all. By default all, and 1 on CPU, which is faster there and needs less memory.
      progress: show a bar and print the plan.
      callbacks: are notified of what each pack does (`lora_jax.train.Callback`), and may stop it.
      trackers: where metrics go (`lora_jax.trackers`), each cell in a run of its own: the mean
        training loss of every 50 steps, and the evaluations.

    Returns:
      `SweepResults`, one `CellResult` per cell. A cell that fails (a wrong setting, a loss that is
      not finite) has its `error`, and the others go on. What has finished is never thrown away: a
      later pack that cannot run, or Ctrl-C, leaves its cells with an `error`.

    Raises:
      RequestError: something is wrong with the sweep as a whole.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> base = {"w": jnp.eye(4), "v": jnp.ones((4, 1))}
    >>> loss = lambda p, batch: jnp.mean((jnp.tanh(batch @ p["w"]) @ p["v"] - 1.0) ** 2)
    >>> cells = [{"targets": "w", "rank": r, "lr": 1e-2} for r in (1, 2)]
    >>> found = lj.sweep(loss, base, [jnp.ones((8, 4))], cells, num_steps=3, progress=False)
    >>> [row.trainable["w"]["a"].shape for row in found]
    [(4, 1), (4, 2)]
    """
    if num_steps < 1 or min(eval_every, patience, at_once or 0) < 0:
        raise RequestError(
            f"num_steps={num_steps} must be at least 1; eval_every={eval_every}, "
            f"patience={patience} and at_once={at_once} at least 0"
        )
    if patience and not (validation and eval_every):
        raise RequestError(f"patience={patience} needs validation batches and eval_every")
    if tune is not None and not validation:
        raise RequestError(f"tune={tune!r} chooses on validation; give validation batches")
    optimizer = OptimizerSettings(
        schedule=schedule, warmup_ratio=warmup_ratio, clip_norm=clip_norm, beta1=beta1,
        beta2=beta2, eps=eps,
    )  # fmt: skip
    expanded, tuned = tuned_cells(cells, tune)
    made = read_cells(expanded, axes=axes, aliases=aliases, optimizer=optimizer)
    if tx is not None:
        _check_own_optimizer(tx, made, optimizer)
    runner = InMemory(
        memory_bytes=memory_bytes or device_memory_bytes(),
        loss=lift(_of_shown(loss_fn)),
        metrics=None if metrics is None else lift(_of_shown(metrics)),
        params=trees.hide_static(params),
        source=OwnBatches(batches) if callable(batches) else SharedBatches(batches),
        validation=[jax.tree.map(jnp.asarray, batch) for batch in validation],
        tx=tx,
        schedule=Schedule(num_steps, eval_every, patience),
        at_once=default_at_once() if at_once is None else at_once,
        progress=progress,
        callbacks=callbacks,
        links=make_links(trackers),
    )
    runner.run(made)
    rows = []
    for cell in made:
        row = runner.results[cell.name]
        if isinstance(row, RequestError):
            row = CellResult(cell.name, cell.shown, cell.made, error=str(row))
        rows.append(dataclasses.replace(row, group=tuned.get(row.name, "")))
    return SweepResults(rows, "\n".join(runner.lines), tune[0] if tune else "")


def _check_own_optimizer(tx: Any, cells: Sequence[Cell], settings: OptimizerSettings) -> None:
    if not callable(tx):
        raise RequestError(
            f"tx is a {type(tx).__name__}; give a function of the learning rate, such as "
            "tx=optax.lion, so that cells of different rates may share a program"
        )
    default = OptimizerSettings()
    if any(settings[name] != default[name] for name in ("beta1", "beta2", "eps")):
        raise RequestError("beta1, beta2 and eps are AdamW's; give them to the optimizer in tx")
    for cell in cells:
        own = cell.config.optimizer
        given = [name for name in ("weight_decay", "head_lr", "lr_by_path") if own[name]]
        if cell.refused is None and given:
            raise RequestError(
                f"cell {cell.name!r} gives {given[0]}={own[given[0]]!r}, which is AdamW's here; "
                "give it to the optimizer in tx"
            )


def _of_shown(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The user's function, which sees the Python leaves (activations, flags) of its own tree."""

    @functools.wraps(function)
    def of_shown(params, batch):
        return function(trees.show_static(params), batch)

    return of_shown
