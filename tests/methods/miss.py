"""MiSS, as a user's own file outside the package has it.

Source: Kang & Yin 2024, arXiv:2409.15371 ("MiSS: Matrix Shard Sharing"): ΔW is one trained shard
D (r, out), zero at the start, repeated along the inputs: row i of ΔW (in, out) is row i mod r of D.
There is no scale.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

import lora_jax as lj


@dataclasses.dataclass(frozen=True)
class MiSS(lj.LoRA):
    """ΔW[i] = shard[i mod r]; `shard (stack…, r, out…)` trains."""

    TITLE: ClassVar = "MiSS"
    PARTS: ClassVar = {"shard": "sro"}
    # A further row would take a part of the inputs; zeros on a further target would train.
    ZERO_PADDABLE: ClassVar = frozenset()
    UNSUPPORTED_SETTINGS: ClassVar = {
        "alpha": "its ΔW has no scale",
        "init": "its shard starts at zero",
    }

    def scale(self, rule):
        return 1.0

    def init_parts(self, key, kernel, site):
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        return {"shard": jnp.zeros(site.part_shape("sro"), dtype)}

    def factors(self, parts, site):
        shard = parts["shard"]
        # ΔW = expand @ shard: sums the inputs of one remainder, then multiplies by the shard.
        rows = jnp.arange(site.size("i")) % site.rank
        expand = jax.nn.one_hot(rows, site.rank, dtype=shard.dtype)
        expand = expand.reshape(*site.sizes("i"), site.rank)
        return jnp.broadcast_to(expand, site.part_shape("sir")), shard
