"""Adapted values: what sits in the params tree where a plain array sat.

`LoRAWeight` is the low-rank one: the frozen `kernel` and the factors of ΔW = scale · a @ b, which
is never formed where a primitive has a low-rank rule. `GainWeight` multiplies each output of what
it holds. What all values share, and how they follow a kernel through transposes, reshapes and
slices, is in `core/values.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.explicit import region_of
from lora_jax.core.labelled_dot import cast, contract, times_side
from lora_jax.core.values import RANK, AdaptedValue, Use, materialise, use_beneath


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAWeight(AdaptedValue):
    """`kernel + scale * a @ b`, kept apart.

    Fields: `kernel` any float dtype; `a (stack…, in…, r)`, `b (stack…, r, out…)`; `scale (stack…)`
    float, data and not trained; `key` None or random keys `(stack…)`: present means that adapter
    dropout is on; `dropout` None or `(stack…)` float, the probability of dropping an entry of the
    adapter's input (Hu et al. 2021 code: on the adapter path only), data like the scale, so that
    adapters which differ in it share a program; `roles` one letter per kernel axis.
    """

    a: Any
    b: Any
    scale: Any
    key: Any = None
    dropout: Any = None

    SIDES: ClassVar = {"a": "sir", "b": "sro", "scale": "s", "key": "s", "dropout": "s"}

    @property
    def is_random(self) -> bool:
        return self.key is not None or super().is_random

    def delta(self) -> jax.Array:
        """ΔW = scale · a @ b of this adapter in the kernel's shape, float32 or wider.

        Uses the highest matmul precision: a merged weight is stored once and used for ever.
        """
        dtype = float32_or_wider(self.a.dtype, self.dtype)
        a_axes, b_axes = self.side_axes("a"), self.side_axes("b")
        scaled = self.scaled(self.a.astype(dtype), a_axes)
        order = list(range(self.ndim))
        highest = lax.Precision.HIGHEST
        return contract(scaled, a_axes, self.b.astype(dtype), b_axes, order, precision=highest)

    def materialise(self) -> jax.Array:
        delta = self.delta()
        # Rounded once, at the end, however many adapters there are.
        wide = self.on_base(lambda kernel: kernel.astype(delta.dtype)).kernel
        return (materialise(wide) + delta).astype(self.dtype)

    def scaled(self, x, x_axes):
        """`x * scale`, the scale's stack axes matched to those of `x`."""
        return times_side(x, x_axes, jnp.asarray(self.scale), self.side_axes("scale"))

    def use(self, use: Use) -> jax.Array | None:
        def low_rank(others, weight):
            return dataclasses.replace(use, others=others).low_rank(weight)

        region = region_of(self)
        delta = region.run(low_rank, use.others, self)
        if delta is None:
            return None
        # The frozen product comes as it was: only so is a fresh adapter bit-equal to the base.
        base = use_beneath(self.kernel, use)
        if base is None:
            return None
        back: Any = region.back(delta, base)
        return lax.add(base, cast(back, base.dtype))

    def times(self, factor, bind) -> Self | None:
        scale = jnp.asarray(self.scale)
        times = super().times(factor, bind)
        if not jnp.iscomplexobj(factor):  # only a kernel that is complex meets such a number
            factor = factor.astype(scale.dtype)
        return times and dataclasses.replace(times, scale=scale * factor)

    def moved(self, sign: int, bind) -> Self | None:
        kernel = self._beneath(bind, "moved", sign, bind)
        return self._on_kernel(kernel, scale=sign * jnp.asarray(self.scale))

    def pad(self, value, config) -> Self | None:
        # ΔW is zero in every row and column that is added, so either factor may hold the zeros.
        if any(tuple(config[axis]) != (0, 0, 0) for axis in self.axes("s")):
            return None
        kernel = self._beneath(lambda x: lax.pad(x, value, config), "pad", value, config)

        def padded(x, x_axes):
            around = [(0, 0, 0) if axis == RANK else config[axis] for axis in x_axes]
            return lax.pad(x, jnp.zeros((), x.dtype), around)

        sides = {name: padded(getattr(self, name), self.side_axes(name)) for name in ("a", "b")}
        return self._on_kernel(kernel, **sides)

    def dropped(self, x, uses: int):
        """Inverted dropout on the adapter's input, by a mask of its own at each equation.

        What repeats an equation repeats its mask: a loop around a kernel that stays, an outer vmap.
        """
        if self.key is None:
            return x
        # Matrices stacked in one kernel and used at once share the first one's mask and rate.
        key, rate = (leaf.reshape(-1)[0] for leaf in (self.key, jnp.asarray(self.dropout)))
        kept = 1.0 - rate
        keep = jax.random.bernoulli(jax.random.fold_in(key, uses), kept, x.shape)
        return jnp.where(keep, x / kept.astype(x.dtype), jnp.zeros_like(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GainWeight(AdaptedValue):
    """`kernel` with each of its outputs times a gain: `gain (stack…, out…)`, float.

    What DoRA is made of: the gain is the trained magnitude over the norm of what it holds.
    """

    gain: Any

    SIDES: ClassVar = {"gain": "so"}

    def materialise(self) -> jax.Array:
        dtype = float32_or_wider(self.gain.dtype, self.dtype)
        wide = materialise(self.on_base(lambda kernel: kernel.astype(dtype)).kernel)
        order = list(range(self.ndim))
        return times_side(wide, order, self.gain, self.side_axes("gain")).astype(self.dtype)

    def use(self, use: Use) -> jax.Array | None:
        axes = self.side_axes("gain")
        side = use.gain_on_outputs(self.gain, axes)
        if side is not None:
            inner = use_beneath(self.kernel, use)
            if inner is None:
                return None
            wide = float32_or_wider(inner.dtype, self.gain.dtype)
            return times_side(inner.astype(wide), use.out_axes, *side).astype(inner.dtype)
        # Contracted over the outputs, as a tied head does: the gain goes onto the other operand.
        scaled = use.with_gain(self.gain, axes)
        return None if scaled is None else use_beneath(self.kernel, scaled)
