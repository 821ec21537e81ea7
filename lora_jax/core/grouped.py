"""Convolutions by a stack of kernels, whose outputs lie in one axis: as many groups of features.

So `vmap` writes a convolution vmapped over its kernels, and Keras a depthwise one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.uses import ConvUse
from lora_jax.core.values import RANK, AdaptedValue, Use
from lora_jax.core.weights import LoRAWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedWeight(AdaptedValue):
    """An adapted value with its axes `axis` (stacked) and `axis + 1` (outputs) seen as one.

    No role says that of one axis, so `kernel` keeps them apart; only a convolution follows.
    """

    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, value: AdaptedValue, shape: tuple[int, ...]) -> GroupedWeight | None:
        """The value in this shape, if that puts a stack axis and outputs into one; else None."""
        roles = value.current_roles
        first = roles.find("so")
        if first < 0:
            return None
        pair = value.shape[first : first + 2]
        for axis in (n for n, size in enumerate(shape) if size == math.prod(pair)):
            apart = value.reshape((*shape[:axis], *pair, *shape[axis + 1 :]))
            if apart is not None and apart.current_roles[axis : axis + 2] == "so":
                roles = apart.current_roles
                roles = roles[:axis] + roles[axis + 1 :]
                return cls(kernel=apart, roles=roles, path=value.path, axis=axis)
        return None

    @property
    def base(self) -> jax.ShapeDtypeStruct:
        apart, axis = self.kernel.shape, self.axis
        shape = (*apart[:axis], apart[axis] * apart[axis + 1], *apart[axis + 2 :])
        return jax.ShapeDtypeStruct(shape, self.kernel.dtype)

    def base_array(self) -> jax.Array:
        return lax.reshape(self.kernel.base_array(), self.shape)

    def materialise(self) -> jax.Array:
        return lax.reshape(self.kernel.materialise(), self.shape)

    def use(self, use: Use) -> jax.Array | None:
        if not isinstance(use, ConvUse) or use.out_axis != self.axis:
            return None
        return self.kernel.use(GroupedUse(**vars(use), axis=self.axis))

    def on_base(self, change) -> GroupedWeight:
        def changed(kernel):
            return lax.reshape(change(lax.reshape(kernel, self.shape)), kernel.shape)

        return super().on_base(changed)

    def marked(self, mark) -> GroupedWeight:
        return self.on_base(mark)

    def scan_axis_is_stack(self) -> bool:
        return False

    # No role says what its one axis holds, so it follows no change of its axes.
    def transpose(self, permutation) -> None:
        return None

    def reshape(self, shape) -> None:
        return None

    def _each_along(self, change, method, *args) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class GroupedUse(ConvUse):
    """A convolution by the kernel in `kernel_shape`, whose axis `axis` the value holds as two."""

    axis: int = 0

    @property
    def out_axes(self) -> list:
        return ["grouped" if axis == self.axis else axis for axis in super().out_axes]

    def bind(self, kernel):
        return super().bind(lax.reshape(kernel, self.kernel_shape))

    def gain_on_outputs(self, gain, axes):
        pair, size = [self.axis, self.axis + 1], self.kernel_shape[self.axis]
        if [axis for axis in axes if axis in pair] != pair or gain.size != size:
            return None
        return lax.reshape(gain, (size,)), ["grouped"]

    def with_gain(self, gain, axes) -> None:
        return None

    def low_rank(self, weight: LoRAWeight):
        roles = weight.current_roles
        stack, width = weight.shape[self.axis : self.axis + 2]
        # A new axis of size one counts as an output's.
        others = {r for n, r in enumerate(roles) if n - self.axis not in (0, 1) and r != "o"}
        width_of_all = math.prod(weight.shape[axis] for axis in weight.axes("o"))
        groups, left = divmod(self.params["feature_group_count"], stack)
        batched = self.params["batch_group_count"] != 1
        if left or batched or others != {"i"} or width_of_all != width:
            return None
        x = weight.dropped(self.other, self.uses)
        wide = float32_or_wider(x.dtype)
        a_axes: list[Any] = weight.side_axes("a")
        scaled = weight.scaled(weight.a.astype(wide), a_axes).astype(x.dtype)
        # (…, stack, groups, r, …): within its part of the stack every group meets the same `a`.
        order = [RANK if axis == self.axis + 1 else axis for axis in range(weight.ndim)]
        order = [axis for axis in order if axis in a_axes]
        a = lax.transpose(scaled, [a_axes.index(axis) for axis in order])
        a = jnp.stack([a] * groups, axis=order.index(self.axis) + 1)
        rank = weight.b.shape[1]
        before, after = self.kernel_shape[: self.axis], self.kernel_shape[self.axis + 1 :]
        a = a.reshape(*before, stack * groups * rank, *after)
        hidden = self.convolved(x, a, wide).astype(x.dtype)
        b = weight.b.astype(x.dtype).reshape(stack, rank, groups, width // groups)
        return self.by_group("...sgr,srgo->...sgo", hidden, b, (stack, groups), wide)
