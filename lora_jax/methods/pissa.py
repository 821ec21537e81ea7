"""PiSSA: an adapter that starts as the principal part of the kernel.

Source: Meng, Wang & Zhang 2024, arXiv:2404.02948, §3: with W = U S Vᵀ, the factors start at
U_r √S_r and √S_r V_rᵀ, and what is frozen is the residual W − U_r S_r V_rᵀ.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.methods.lora import LoRA
from lora_jax.methods.sites import Site
from lora_jax.methods.starts import times_ranks, top_singular


@dataclasses.dataclass(frozen=True, init=False)
class PiSSA(LoRA):
    """W' = W + s (a @ b − start_a @ start_b), where a, b start at the principal part of W / s.

    The residual W − s · start_a @ start_b is not stored: its second term is a fixed adapter next to
    the trained one. So the base stays the one that all other adapters have, its hash too; ΔW is at
    hand, and is the plain LoRA of rank 2r that `to_lora` exports. The arithmetic is that of rank
    2r. A fresh adapter is the base to rounding.
    """

    TITLE: ClassVar = "PiSSA"
    PARTS: ClassVar = {"a": "sir", "b": "sro", "start_a": "sir", "start_b": "sro"}
    FROZEN_PARTS: ClassVar = frozenset({"start_a", "start_b"})
    UNSUPPORTED_SETTINGS: ClassVar = {
        "init": "its factors start from the kernel's singular vectors"
    }
    FROM_KERNEL: ClassVar = True

    def init_parts(self, key: jax.Array, kernel: jax.Array, site: Site) -> dict[str, jax.Array]:
        p, sigma, q = top_singular(kernel, site)
        root = jnp.sqrt(sigma / self.scale(site.rule))
        a, b = times_ranks(p, root, "sir", site), times_ranks(q, root, "sro", site)
        # Copies: what trains may be donated.
        return {"a": a, "b": b, "start_a": jnp.copy(a), "start_b": jnp.copy(b)}

    def factors(self, parts, site: Site) -> tuple[jax.Array, jax.Array]:
        a = jnp.concatenate([parts["a"], parts["start_a"]], axis=-1)
        rank_axis = len(site.sizes("s"))
        return a, jnp.concatenate([parts["b"], -parts["start_b"]], axis=rank_axis)
