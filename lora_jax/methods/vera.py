"""VeRA: shared random factors that stay, and trained vectors that scale them.

Source: Kopiczko, Blankevoort & Asano 2024, arXiv:2310.11454, Eq. 2: h = W x + Λ_b B Λ_d A x, with A
and B random, frozen and shared by all layers; d starts at 0.1, b at zero.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp

from lora_jax.core.draws import key_from_seed, partitionable
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule
from lora_jax.methods.base import PROBED, Trainable
from lora_jax.methods.lora import LoRA, LoRASettings
from lora_jax.methods.sites import Site
from lora_jax.methods.starts import times_ranks


@dataclasses.dataclass(frozen=True, init=False)
class VeRA(LoRA):
    """ΔW = A · diag(lambda_d) · B · diag(lambda_b); `lambda_d (stack…, r)`, `lambda_b (stack…,
    out…)` train.

    A and B are drawn from `projection_seed` whenever they are bound (Kaiming-uniform, as the paper
    has them), the same for all kernels with as many inputs, or outputs; so an adapter's file holds
    the two vectors alone. They are small by rank 256 and more: see the paper's Table 2.
    """

    projection_seed: int = dataclasses.field(
        default=0, metadata={"help": "decides the random factors"}
    )

    TITLE: ClassVar = "VeRA"
    PARTS: ClassVar = {"lambda_d": "sr", "lambda_b": "so"}
    # A further random direction would take part in the training of lambda_b.
    ZERO_PADDABLE: ClassVar = frozenset()
    ANY_RANK: ClassVar = True  # r random directions, not a factorisation
    UNSUPPORTED_SETTINGS: ClassVar = {
        "alpha": "its two trained vectors are the scale",
        "init": "its random factors are Kaiming-uniform, from projection_seed",
    }
    D_INITIAL: ClassVar = 0.1

    def __init__(self, *, projection_seed: int = 0, **settings: Unpack[LoRASettings]):
        if isinstance(projection_seed, bool) or not isinstance(projection_seed, int):
            raise RequestError(f"projection_seed is {projection_seed!r}; it must be a whole number")
        super().__init__(**settings)
        object.__setattr__(self, "projection_seed", projection_seed)

    def _keys(self) -> jax.Array:
        return jax.random.split(key_from_seed(self.projection_seed))

    @partitionable()
    def drawn(self, trainable: Trainable) -> dict[str, list[float]]:
        bits = [_kaiming(key, (PROBED,), 1, jnp.float32) for key in self._keys()]
        return {name: row.tolist() for name, row in zip("AB", bits, strict=True)}

    def scale(self, rule: Rule) -> float:
        return 1.0

    def init_parts(self, key: jax.Array, kernel: jax.Array, site: Site) -> dict[str, jax.Array]:
        dtype = float32_or_wider(kernel.dtype)
        return {
            "lambda_d": jnp.full(site.part_shape("sr"), self.D_INITIAL, dtype),
            "lambda_b": jnp.zeros(site.part_shape("so"), dtype),
        }

    @partitionable()
    def factors(self, parts, site: Site) -> tuple[jax.Array, jax.Array]:
        d, lambda_b = parts["lambda_d"], parts["lambda_b"]
        stack, ones = site.sizes("s"), (1,) * len(site.sizes("s"))
        # Behind a barrier, so that XLA does not draw them at compile time, number by number.
        key_a, key_b = jax.lax.optimization_barrier(self._keys())
        a = _kaiming(key_a, (site.size("i"), site.rank), site.size("i"), d.dtype)
        b = _kaiming(key_b, (site.rank, site.size("o")), site.rank, d.dtype)
        a = jnp.broadcast_to(a.reshape(*ones, *site.sizes("i"), -1), site.part_shape("sir"))
        b = b.reshape(*ones, site.rank, *site.sizes("o"))
        by_output = lambda_b.reshape(*stack, 1, *site.sizes("o"))
        return times_ranks(a, d, "sir", site), b * by_output


def _kaiming(key, shape, fan_in: int, dtype) -> jax.Array:
    bound = math.sqrt(6.0 / fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)
