"""LoRA-XS: an r x r matrix between the kernel's own singular vectors, which stay.

Source: Bałazy et al. 2024, arXiv:2405.17604, §3: h = W x + B R A x with A = V_rᵀ and B = U_r Σ_r of
W's SVD frozen, and R (r, r) trained, starting at N(0, σ²) with σ = 1e-5.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from lora_jax.methods.lora import LoRA
from lora_jax.methods.sites import Site
from lora_jax.methods.starts import times_ranks, top_singular


@dataclasses.dataclass(frozen=True, init=False)
class LoRAXS(LoRA):
    """ΔW = (alpha / rank) · a @ core @ b; `core (stack…, r, r)` trains.

    `a (in, r)` are the kernel's first singular vectors in input space, `b (r, out)` those in output
    space times their singular values. Both are part of `trainable` and of the adapter's file, where
    no other machine's SVD can turn them; no gradient of them is computed. Give your optimizer as
    `method.optimizer(tx)`.
    """

    TITLE: ClassVar = "LoRA-XS"
    PARTS: ClassVar = {"a": "sir", "core": "srr", "b": "sro"}
    FROZEN_PARTS: ClassVar = frozenset({"a", "b"})
    UNSUPPORTED_SETTINGS: ClassVar = {"init": "its factors are the kernel's singular vectors"}
    STD: ClassVar = 1e-5
    FROM_KERNEL: ClassVar = True

    def init_parts(self, key: jax.Array, kernel: jax.Array, site: Site) -> dict[str, jax.Array]:
        p, sigma, q = top_singular(kernel, site)
        core = self.STD * jax.random.normal(key, site.part_shape("srr"), p.dtype)
        return {"a": p, "core": core, "b": times_ranks(q, sigma, "sro", site)}

    def factors(self, parts, site: Site) -> tuple[jax.Array, jax.Array]:
        a, core = parts["a"], parts["core"]
        rows = a.reshape(*site.sizes("s"), site.size("i"), a.shape[-1])
        return (rows @ core).reshape(a.shape), parts["b"]
