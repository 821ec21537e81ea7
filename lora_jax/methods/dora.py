"""DoRA: the magnitude of each output's weights trained apart from their direction.

Source: Liu et al. 2024, arXiv:2402.09353, Eq. 5: W' = m (W + ΔW) / ‖W + ΔW‖, the norm taken over
the inputs of each output, m starting at ‖W‖; and §4.3: the norm is held constant in the backward
pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.labelled_dot import contract
from lora_jax.core.values import RANK, AdaptedValue
from lora_jax.core.weights import GainWeight, LoRAWeight
from lora_jax.methods.lora import LoRA
from lora_jax.methods.sites import Site, are_apart, path_of


@dataclasses.dataclass(frozen=True, init=False)
class DoRA(LoRA):
    """W' = magnitude · (W + ΔW) / ‖W + ΔW‖, column by column; `magnitude (stack…, out…)` trains.

    Neither W + ΔW nor ΔW is formed: the frozen product and the low-rank one are added and then
    scaled, and the norm comes from `norm_of`.
    """

    TITLE: ClassVar = "DoRA"
    PARTS: ClassVar = {"a": "sir", "b": "sro", "magnitude": "so"}
    # A magnitude of zero is not the base.
    ZERO_PADDABLE: ClassVar = frozenset({"ranks"})
    FROM_KERNEL: ClassVar = True

    def init_parts(self, key: jax.Array, kernel: jax.Array, site: Site) -> dict[str, jax.Array]:
        if site.rule.slice and site.roles[site.rule.slice[0]] == "i":
            raise RequestError(
                f"slice {site.rule.slice} of {site.path!r} is a part of the inputs, and DoRA's "
                "norm is over all of them; slice an axis of outputs, or use LoRA"
            )
        parts = super().init_parts(key, kernel, site)
        start = LoRAWeight(
            kernel=kernel, a=parts["a"], b=parts["b"], scale=jnp.ones(site.sizes("s")),
            roles=site.roles, path=site.path,
        )  # fmt: skip
        return {**parts, "magnitude": norm_of(start)}

    def _check_beneath(self, name: str, beneath: Sequence[str]) -> None:
        if not all(are_apart(name, other) for other in beneath):
            raise RequestError(
                f"{path_of(name)!r} has another adapter beneath DoRA's; bind DoRA first, since its "
                "norm is that of the base and its own ΔW"
            )

    def weight(self, low_rank: LoRAWeight, parts: Any, site: Site) -> AdaptedValue:
        norm = _norm_over_base(low_rank)
        gain = parts["magnitude"] / site.narrow(jax.lax.stop_gradient(norm), "so")
        gain = site.widen(gain, "so", fill=1.0)
        return GainWeight(kernel=low_rank, gain=gain, roles=site.roles, path=site.path)


def _norm_over_base(weight: LoRAWeight) -> jax.Array:
    """`norm_of` with the frozen array beneath; of one that is in four bits layer by layer."""
    if not weight.is_stored or weight.current_roles[:1] != "s":
        return norm_of(dataclasses.replace(weight, kernel=weight.base_array()))
    # Walked along the stack, whose other leading axes are walked within.
    own = dataclasses.replace(weight, key=None, dropout=None)
    return jax.lax.map(_norm_over_base, own)


def norm_of(weight: LoRAWeight) -> jax.Array:
    """‖W + s·a@b‖ over the inputs, (stack…, out…), in float32 or wider.

    As √(‖W‖² + 2s⟨W, ab⟩ + s²‖ab‖²): the middle term is ⟨Wᵀa, bᵀ⟩, the last (aᵀa b) · b, so that
    nothing of the kernel's size is formed.
    """
    wide = float32_or_wider(weight.a.dtype)
    kernel, a, b = (x.astype(wide) for x in (weight.kernel, weight.a, weight.b))
    kernel_axes = list(range(kernel.ndim))
    a_axes, b_axes = weight.side_axes("a"), weight.side_axes("b")
    out = [*weight.axes("s"), *weight.axes("o")]
    inputs = tuple(weight.axes("i"))
    # The kernel's own axes are in order once the inputs are gone; those of `out` may not be.
    order = [[n for n in kernel_axes if n not in inputs].index(n) for n in out]
    squares = jnp.sum(kernel * kernel, axis=inputs).transpose(order)
    scaled_b = weight.scaled(b, b_axes)
    along = contract(kernel, kernel_axes, a, a_axes, b_axes)
    other = [axis if axis != RANK else "other" for axis in a_axes]
    gram_axes = [*weight.axes("s"), "other", RANK]
    gram = contract(a, other, a, a_axes, gram_axes)
    square_of_delta = contract(
        gram, gram_axes, scaled_b, b_axes, [axis if axis != RANK else "other" for axis in b_axes]
    )
    place = b_axes.index(RANK)
    total = squares + jnp.sum((2.0 * along + square_of_delta) * scaled_b, axis=place)
    # Rounding may leave a hair below zero where W + ΔW is zero.
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(wide).tiny))
