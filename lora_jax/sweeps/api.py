"""`lj.sweep`: many adapters trained at once on one frozen base, for anybody's model."""

from __future__ import annotations

import itertools
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.sweeps.engine import PackTraining, Schedule
from lora_jax.sweeps.plan import Planned, make_plan, plan_pack
from lora_jax.sweeps.results import CellResult, SweepResults
from lora_jax.sweeps.settings import CellSettings, read_cells
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.progress import show_progress


def sweep(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Sequence[Any] | Callable[[int], Iterable[Any]],
    cells: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
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
    progress: bool = True,
) -> SweepResults:
    """Trains every cell with AdamW; cells whose shapes agree train as one compiled program.

    Args:
      loss_fn: `loss_fn(params, batch) -> ()` of any JAX model; it need know nothing of adapters.
      params: the frozen base: dict, `nnx.State`, module tree.
      batches: a sequence that all cells go through in order, over and over; or `batches(seed)`, an
        iterable of `num_steps` batches or more for each cell's own order (same shapes for all).
      cells: dicts of `targets`, `rank`, `alpha`, `dropout`, `init` (see `LoRA`), `lr` (the peak
        rate), `weight_decay`, `seed`, `train` (parameters trained whole), `name`, and `method`:
        "lora" (default), "head", "bitfit", "full", or a `Method`.
      num_steps: optimizer steps. `eval_every` steps (and at the last) the mean loss over
        `validation` is taken; the best one's trainable is kept, and a cell whose loss did not get
        better `patience` times in a row stops (0: never).
      schedule, warmup_ratio, clip_norm, beta1, beta2, eps: as in `train.make_optimizer`; clipping
        is by the norm of each cell's own gradients, 0 for none.
      axes, aliases: as in `LoRA`.
      memory_bytes: what a program may hold; packs are split until they fit. By default what the
        device has, or half of the host's memory.
      progress: show a bar and print the plan.

    Returns one result a cell. A cell that fails (an impossible rank, a loss that is not a number)
    has its `error`; the others are not affected. Raises `RequestError` for what is wrong with the
    sweep as a whole.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> base = {"w": jnp.eye(4), "v": jnp.ones((4, 1))}
    >>> loss = lambda p, batch: jnp.mean((jnp.tanh(batch @ p["w"]) @ p["v"] - 1.0) ** 2)
    >>> cells = [{"targets": "w", "rank": r, "lr": 1e-2} for r in (1, 2)]
    >>> found = lj.sweep(loss, base, [jnp.ones((8, 4))], cells, num_steps=3, progress=False)
    >>> [row.trainable["w"]["a"].shape for row in found]
    [(4, 1), (4, 2)]
    """
    if num_steps < 1 or eval_every < 0 or patience < 0:
        raise RequestError(
            f"num_steps={num_steps}, eval_every={eval_every}, patience={patience}: at least 1, 0, 0"
        )
    if patience and not (validation and eval_every):
        raise RequestError(f"patience={patience} needs validation batches and eval_every")
    source = batches if callable(batches) else tuple(batches)
    if source == ():
        raise RequestError("batches is empty; give a sequence of batches or a function of a seed")
    named = read_cells(cells, axes=axes, aliases=aliases)
    planned, refused = make_plan(named, params)
    shared = {
        "schedule": schedule,
        "warmup_ratio": warmup_ratio,
        "clip_norm": clip_norm,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
    }

    def tx_of(cell: CellSettings):
        own = {"lr": cell.lr, "weight_decay": cell.weight_decay}
        return make_optimizer(types.SimpleNamespace(**shared, **own), num_steps)

    def train(plan: Planned) -> PackTraining:
        return PackTraining(
            plan.pack,
            plan.cells,
            params,
            lift(loss_fn),
            tx_of,
            batch_axis=0 if callable(source) else None,
            validation=tuple(validation),
            schedule=Schedule(num_steps, eval_every, patience),
        )

    budget = memory_bytes or device_memory_bytes()
    waiting, found, lines = list(planned), {}, []
    while waiting:
        plan = waiting.pop(0)
        training = train(plan)
        needed = training.bytes_needed(next(_stream(source, plan.cells)))
        if needed > budget and len(plan.cells) > 1:
            half = len(plan.cells) // 2
            halves = plan.cells[:half], plan.cells[half:]
            waiting = [*(plan_pack(cells, params) for cells in halves), *waiting]
            continue
        number = len(lines) + 1
        lines.append(f"pack {number}: {plan} ({needed / 2**20:,.1f} MiB)")
        name = f"pack {number} of {number + len(waiting)}"
        with show_progress(name, num_steps, enabled=progress) as show:
            if progress:
                print(lines[-1])
            training.run(lambda cells: _stream(source, cells), lambda n, loss: show(n, loss, None))
        found |= {row.name: row for row in training.results(number)}
    rows = [found.get(cell.name) or _refused(cell, refused[cell.name]) for cell in named]
    return SweepResults(rows, "\n".join(lines))


def _refused(cell: CellSettings, why: str) -> CellResult:
    """The result of a cell that was never begun."""
    nothing = {"validation": (), "best_step": 0, "best_loss": None, "trainable": None}
    return CellResult(
        cell.name,
        cell.given,
        cell.method,
        losses=np.zeros(0, np.float32),
        stopped="",
        error=why,
        seconds=0.0,
        pack=0,
        width=0,
        **nothing,
    )


def device_memory_bytes() -> int:
    """What a program may use: nine tenths of the device's memory, on CPU half of the host's."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(0.9 * limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _stream(source, cells: Sequence[CellSettings]) -> Iterator[Any]:
    """Batches for these cells: the shared sequence over and over, or each cell's own, stacked."""
    if not callable(source):
        return itertools.cycle(source)
    each = [iter(source(cell.seed)) for cell in cells]

    def stacked():
        count = 0
        for own in zip(*each, strict=False):
            count += 1
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *own)
        raise RequestError(f"batches(seed) gave {count} batches; a sweep needs one for each step")

    return stacked()
