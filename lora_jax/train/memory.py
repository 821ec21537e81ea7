"""What a train step takes of a device's memory, by the compiled program, before it runs."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import Stored, flatten
from lora_jax.parallel.offload import is_in_hosts_memory
from lora_jax.train.compilation import memory_of


def num_bytes(tree: Any, *, of_a_device: bool = False) -> int:
    """Bytes of all arrays, or shape structs, of a tree: of all devices together, or what one of
    those that share them holds in its own memory."""
    return sum(_bytes_of(leaf, of_a_device) for leaf in jax.tree.leaves(tree))


def _bytes_of(leaf: Any, of_a_device: bool) -> int:
    where = getattr(leaf, "sharding", None)
    if not of_a_device or where is None:
        return leaf.size * leaf.dtype.itemsize
    if is_in_hosts_memory(where):
        return 0
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def device_limit_bytes(num_devices: int = 1) -> int:
    """The memory of the first device; on CPU that of the host, which so many devices share."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_devices)


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
    def of(cls, compiled: Any, *, base: Any, state: Any, limit: int) -> StepMemory:
        """Of a compiled step whose arguments are `state`, `base` and a batch; results that take no
        argument's place count as temporaries."""
        arguments = compiled.memory_analysis().argument_size_in_bytes
        own = (num_bytes(base, of_a_device=True), num_bytes(state, of_a_device=True))
        return cls(
            *own,
            batch=max(0, arguments - sum(own)),
            temporaries=memory_of(compiled) - arguments,
            limit=limit,
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
