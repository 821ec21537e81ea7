"""How many cells fit into a pack: from the compiled program's own memory analysis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.program import PackedProgram, with_lanes
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.memory import device_limit_bytes


class DoesNotFit(RequestError):
    """One cell alone needs more than the budget."""


def fitting_width(
    program: PackedProgram,
    group: Planned,
    params_of: Callable[[CellSettings], Any],
    frozen: Any,
    source: Any,
    budget: int,
    evaluation: Any = None,
) -> tuple[int, int]:
    """The widest pack of the group's first cells that the budget holds, and its bytes.

    `source.widest(cells)` gives the largest batch, `evaluation` the largest of an evaluation, None
    without one. Only shapes are used: nothing is allocated. Raises `DoesNotFit` if the budget does
    not hold one cell.
    """
    width = len(group.cells)
    while True:
        part = group.take(range(width))
        params = [params_of(cell) for cell in part.cells]
        state = jax.eval_shape(
            lambda part=part, params=params: program.init(part.pack, part.cells, params)
        )
        batch = source.widest(part.cells)
        data = part.pack.data()
        if (lanes := program.padded(width)) != width:
            state, data = (with_lanes(tree, lanes) for tree in (state, data))
            batch = source.widest([part.cells[min(k, width - 1)] for k in range(lanes)])
        needed = program.bytes_needed(state, (data, frozen), batch, evaluation)
        if needed <= budget:
            return width, needed
        parts = program.num_parts
        if lanes == parts:  # one on each
            raise DoesNotFit(
                f"one cell alone needs {needed / 2**20:,.1f} MiB of {budget / 2**20:,.1f} MiB; use "
                "smaller batches or raise the memory budget"
            )
        width = parts * math.ceil(lanes // parts / 2)


def device_memory_bytes(num_devices: int = 1) -> int:
    """What a program may use: nine tenths of the device's memory, on CPU half of the host's, which
    so many devices share."""
    share = 0.5 if jax.default_backend() == "cpu" else 0.9
    return int(share * device_limit_bytes(num_devices))
