"""Equations that are linear in a kernel: the frozen product, and the low-rank one beside it.

Each class here, and `GatherUse` in `lookups.py`, is one primitive's use of one kernel. `bind`
computes it with a plain kernel, `low_rank` with ΔW = scale · a @ b of a `LoRAWeight` through its
factors. A gain along some axes of the kernel is `(side, axes)` on the result by `gain_on_outputs`,
or, where the equation contracts its axes, on the other operand: `with_gain` is the same use with
that one scaled. Either may be None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.cpu_layout import is_thin_case, thin_products
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.labelled_dot import contract_labelled
from lora_jax.core.values import RANK, cast, permute, times_side
from lora_jax.core.weights import LoRAWeight


class _KeepsOutputs:
    """A use whose result has the kernel's own outputs as axes: a gain goes onto them as it is."""

    out_axes: Any

    def gain_on_outputs(self, gain, axes):
        return (gain, axes) if all(axis in self.out_axes for axis in axes) else None


@dataclasses.dataclass(frozen=True)
class DotUse(_KeepsOutputs):
    """`dot_general` with the kernel on one side, whatever axes are contracted.

    `frozen(lhs, rhs)` is the equation, its operands in their original order; `uses` counts earlier
    uses of the weight, so that dropout differs from use to use.
    """

    frozen: Callable[[Any, Any], jax.Array]
    other: jax.Array
    dimension_numbers: Any
    on_left: bool
    kernel_ndim: int
    out: jax.ShapeDtypeStruct
    uses: int
    precision: Any = None

    @property
    def contracted(self) -> list[int]:
        return list(self.dimension_numbers[0][0 if self.on_left else 1])

    @property
    def batch(self) -> list[int]:
        return list(self.dimension_numbers[1][0 if self.on_left else 1])

    @property
    def other_axes(self) -> list:
        """Labels of the other operand's axes: the kernel's axis that each meets, or its own."""
        theirs = 1 if self.on_left else 0
        met = [*self.dimension_numbers[1][theirs], *self.dimension_numbers[0][theirs]]
        labels = dict(zip(met, [*self.batch, *self.contracted], strict=True))
        return [labels.get(axis, ("x", axis)) for axis in range(self.other.ndim)]

    @property
    def out_axes(self) -> list:
        met = {*self.contracted, *self.batch}
        kernel_free = [axis for axis in range(self.kernel_ndim) if axis not in met]
        other_free = [axis for axis in self.other_axes if isinstance(axis, tuple)]
        free = kernel_free + other_free if self.on_left else other_free + kernel_free
        return [*self.batch, *free]

    def bind(self, kernel):
        on_left = self.on_left
        return self.frozen(kernel, self.other) if on_left else self.frozen(self.other, kernel)

    def with_gain(self, gain, axes) -> DotUse | None:
        if not all(axis in self.other_axes for axis in axes):
            return None
        scaled = times_side(self.other, self.other_axes, gain, axes)
        return dataclasses.replace(self, other=scaled)

    def low_rank(self, weight: LoRAWeight):
        """(other · a) · b, in the order of the axes of the result."""
        roles = weight.current_roles
        first, second = ("a", "b")
        contracted = {roles[axis] for axis in self.contracted}
        if "o" in contracted and "i" not in contracted:  # the transposed use: a tied head
            first, second = second, first
        one, two = getattr(weight, first), getattr(weight, second)
        x, out = weight.dropped(self.other, self.uses), self.out_axes
        # Low-precision inputs meet the factors in their own dtype and accumulate in float32.
        keeps = jnp.issubdtype(x.dtype, jnp.inexact) and not _only_second_is_complex(x, one)
        compute = x.dtype if keeps else one.dtype
        wide = float32_or_wider(compute)
        preferred = self.out.dtype if jnp.issubdtype(self.out.dtype, jnp.inexact) else wide
        theirs = self.dimension_numbers[0][1 if self.on_left else 0]
        if not self.on_left and is_thin_case(roles, self.contracted, self.batch, theirs, x.ndim):
            delta = thin_products(
                x,
                one,
                two,
                jnp.asarray(weight.scale),
                first_is_a=first == "a",
                precision=self.precision,
                compute=compute,
                wide=wide,
                preferred=preferred,
            )
            return lax.reshape(delta, self.out.shape)
        hidden, hidden_axes = self._product(
            (cast(one, compute), weight.side_axes(first)),
            (cast(x, compute), self.other_axes),
            [*out, *weight.side_axes(second)],
            wide,
        )
        hidden = cast(weight.scaled(hidden, hidden_axes), compute)
        delta, delta_axes = self._product(
            (cast(two, compute), weight.side_axes(second)), (hidden, hidden_axes), out, preferred
        )
        return permute(delta, [delta_axes.index(axis) for axis in out])

    def _product(self, factor, other, keep, preferred):
        """Contracts, the factor on its kernel's side; returns the result and its axes unsorted."""
        (x, x_axes), (y, y_axes) = (factor, other) if self.on_left else (other, factor)
        return contract_labelled(
            x, x_axes, y, y_axes, keep, precision=self.precision, preferred=preferred
        )


def _only_second_is_complex(x, y) -> bool:
    return jnp.iscomplexobj(y) and not jnp.iscomplexobj(x)


@dataclasses.dataclass(frozen=True)
class ConvUse(_KeepsOutputs):
    """`conv_general_dilated` with the kernel on the right, of any spatial rank and groups.

    A convolution with `a` to r channels, then a product with `b` at each position; for the gradient
    of a convolution, where the kernel's outputs are contracted, the other way round.
    """

    frozen: Callable[[Any, Any], jax.Array]
    other: jax.Array
    params: dict[str, Any]
    uses: int

    @property
    def _spec(self):
        return self.params["dimension_numbers"]

    @property
    def out_axis(self) -> int:
        return self._spec.rhs_spec[0]

    @property
    def out_feature(self) -> int:
        return self._spec.out_spec[1]

    @property
    def out_axes(self) -> list:
        feature = self.out_feature
        return [self.out_axis if n == feature else ("x", n) for n in range(self.other.ndim)]

    def bind(self, kernel):
        return self.frozen(self.other, kernel)

    def with_gain(self, gain, axes) -> ConvUse | None:
        if axes != [self._spec.rhs_spec[1]] or self.params["feature_group_count"] != 1:
            return None
        feature = self._spec.lhs_spec[1]
        place = [axes[0] if n == feature else ("x", n) for n in range(self.other.ndim)]
        return dataclasses.replace(self, other=times_side(self.other, place, gain, axes))

    def low_rank(self, weight: LoRAWeight):
        roles, (out_axis, in_axis, *spatial) = weight.current_roles, self._spec.rhs_spec
        if self.params["batch_group_count"] != 1 or "s" in roles:
            return None
        features = {roles[out_axis], roles[in_axis]}
        if features != {"i", "o"} or any(roles[axis] != "i" for axis in spatial):
            return None
        x = weight.dropped(self.other, self.uses)
        compute = x.dtype
        wide = float32_or_wider(compute)
        scale = jnp.asarray(weight.scale, wide)
        a, b = weight.a.astype(compute), weight.b.astype(compute)
        a_axes = weight.side_axes("a")
        groups = self.params["feature_group_count"]
        feature_in, feature_out = self._spec.lhs_spec[1], self._spec.out_spec[1]
        if roles[out_axis] == "o":
            order = [a_axes.index(RANK if axis == out_axis else axis) for axis in range(len(roles))]
            kernel = lax.transpose(a, order)
            # Every group of inputs meets the same `a`, and has r channels of its own.
            kernel = jnp.concatenate([kernel] * groups, axis=out_axis) if groups > 1 else kernel
            hidden = (self.convolved(x, kernel, wide) * scale).astype(compute)
            rank, width = b.shape
            hidden = jnp.moveaxis(hidden, feature_out, -1)
            hidden = hidden.reshape(*hidden.shape[:-1], groups, rank)
            delta = jnp.einsum(
                "...gr,rgo->...go", hidden, b.reshape(rank, groups, width // groups),
                precision=self.params["precision"], preferred_element_type=wide,
            )  # fmt: skip
            return jnp.moveaxis(delta.reshape(*delta.shape[:-2], width), -1, feature_out)
        if groups > 1:
            return None
        hidden = jnp.einsum(
            "...o,ro->...r", jnp.moveaxis(x, feature_in, -1), b,
            precision=self.params["precision"], preferred_element_type=wide,
        )  # fmt: skip
        hidden = jnp.moveaxis((hidden * scale).astype(compute), -1, feature_in)
        order = [a_axes.index(RANK if axis == in_axis else axis) for axis in range(len(roles))]
        return self.convolved(hidden, lax.transpose(a, order), wide)

    def convolved(self, x, kernel, preferred):
        """The convolution of other inputs by another kernel, as this equation has it."""
        return lax.conv_general_dilated(
            x,
            kernel,
            self.params["window_strides"],
            self.params["padding"],
            lhs_dilation=self.params["lhs_dilation"],
            rhs_dilation=self.params["rhs_dilation"],
            dimension_numbers=self._spec,
            feature_group_count=self.params["feature_group_count"],
            precision=self.params["precision"],
            preferred_element_type=preferred,
        )


@dataclasses.dataclass(frozen=True)
class RaggedUse:
    """`ragged_dot`: rows sorted by group, each group with its own matrix of a stacked kernel."""

    frozen: Callable[[Any, Any, Any], jax.Array]
    rows: jax.Array
    group_sizes: jax.Array
    contracted: int
    uses: int
    precision: Any = None

    @property
    def out_axes(self) -> list:
        return [("x", 0), 3 - self.contracted]

    def bind(self, kernel):
        return self.frozen(self.rows, kernel, self.group_sizes)

    def gain_on_outputs(self, gain, axes):
        return self._by_row(gain, axes, 3 - self.contracted)

    def with_gain(self, gain, axes) -> RaggedUse | None:
        by_row = self._by_row(gain, axes, self.contracted)
        if by_row is None:
            return None
        rows = times_side(self.rows, [("x", 0), self.contracted], *by_row)
        return dataclasses.replace(self, rows=rows)

    def _by_row(self, gain, axes, place: int):
        """A gain of each group's matrix along one of its axes, as a gain of the rows."""
        if sorted(axes) != [0, place]:
            return None
        gain = permute(gain, [axes.index(0), axes.index(place)])
        by_row = jnp.repeat(gain, self.group_sizes, axis=0, total_repeat_length=self.rows.shape[0])
        return by_row, [("x", 0), place]

    def low_rank(self, weight: LoRAWeight):
        roles = weight.current_roles
        if roles[0] != "s" or set(roles[1:]) != {"i", "o"}:
            return None
        if _only_second_is_complex(self.rows, weight.a):
            return None
        compute = self.rows.dtype
        wide = float32_or_wider(compute)
        scaled = weight.scaled(weight.a.astype(wide), weight.side_axes("a"))
        a, b = scaled.astype(compute), weight.b.astype(compute)
        if roles[self.contracted] == "o":  # the transposed use
            a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
        options = {"precision": self.precision, "preferred_element_type": wide}
        x = weight.dropped(self.rows, self.uses)
        hidden = lax.ragged_dot(x, a, self.group_sizes, **options)
        return lax.ragged_dot(hidden.astype(compute), b, self.group_sizes, **options)
