"""What a train step takes of a device's memory, by the compiled program, before it runs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import Stored, flatten
from lora_jax.train.compilation import memory_of


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shape structs, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_limit_bytes() -> int:
    """The memory of the first device; on CPU that of the host."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device: `base` frozen parameters, `state` what trains with the optimizer's
    moments, `batch` with what is small, `temporaries` as XLA counts them; `limit` of the device;
    `may_quantize` where four bits would make the base smaller."""

    base: int
    state: int
    batch: int
    temporaries: int
    limit: int
    may_quantize: bool = True

    @property
    def total(self) -> int:
        return self.base + self.state + self.batch + self.temporaries

    @classmethod
    def of(cls, compiled: Any, *, base: Any, state: Any, limit: int | None = None) -> StepMemory:
        """Of a compiled step whose arguments are `state`, `base` and a batch; results that take no
        argument's place count as temporaries."""
        arguments = compiled.memory_analysis().argument_size_in_bytes
        own = (num_bytes(base), num_bytes(state))
        return cls(
            *own,
            batch=max(0, arguments - sum(own)),
            temporaries=memory_of(compiled) - arguments,
            limit=device_limit_bytes() if limit is None else limit,
            may_quantize=not any(isinstance(x, Stored) for x in flatten(base).leaves),
        )

    def __str__(self) -> str:
        return (
            f"{_mib(self.total)} MiB = base {_mib(self.base)} + trained and optimizer "
            f"{_mib(self.state)} + batch {_mib(self.batch)} + temporaries "
            f"{_mib(self.temporaries)}, of {_mib(self.limit)} MiB"
        )

    def check(self) -> None:
        """Raises `RequestError`, with the sum, where the step does not fit."""
        if self.total <= self.limit:
            return
        ways = ["train.accumulate_steps", "train.remat=nothing_saveable", "data.batch_size"]
        if self.base > self.limit // 2:
            ways = ["model.dtype=bfloat16", *ways]
            ways = ["model.quantize=nf4", *ways] if self.may_quantize else ways
        raise RequestError(f"a train step does not fit: it takes {self}; look at {', '.join(ways)}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.2f}"
