"""Equations that are linear in a kernel: the frozen product, and the low-rank one added to it.

Each class here, and `GatherUse` in `lookups.py`, is one primitive's use of one kernel. `bind`
computes it with a plain kernel, `low_rank` with ΔW = scale · a @ b of a `LoRAWeight` through its
factors (see `Use`).
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
from jax import lax

from lora_jax.core import jaxprs
from lora_jax.core.cpu_layout import is_thin, thin_products
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.labelled_dot import cast, contract_labelled, permute
from lora_jax.core.values import RANK, Use
from lora_jax.core.weights import LoRAWeight


class DotUse(Use):
    """`dot_general` with the kernel on one side, whatever axes are contracted."""

    @property
    def contracted(self) -> list[int]:
        return list(self.params["dimension_numbers"][0][self.place])

    @property
    def batch(self) -> list[int]:
        return list(self.params["dimension_numbers"][1][self.place])

    @property
    def other_axes(self) -> list:
        """Labels of the other operand's axes: the kernel's axis that each meets, or its own."""
        contracting, batch = self.params["dimension_numbers"]
        met = [*batch[1 - self.place], *contracting[1 - self.place]]
        labels = dict(zip(met, [*self.batch, *self.contracted], strict=True))
        return [labels.get(axis, ("x", axis)) for axis in range(self.other.ndim)]

    @property
    def out_axes(self) -> list:
        met = {*self.contracted, *self.batch}
        kernel_free = [axis for axis in range(len(self.kernel_shape)) if axis not in met]
        other_free = [axis for axis in self.other_axes if isinstance(axis, tuple)]
        free = other_free + kernel_free if self.place else kernel_free + other_free
        return [*self.batch, *free]

    def with_gain(self, gain, axes) -> Self | None:
        labels = self.other_axes
        met = all(axis in labels for axis in axes)
        return self.with_other_times(labels, gain, axes) if met else None

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
        if is_thin(self, roles):
            delta = thin_products(
                x, weight, first_is_a=first == "a", compute=compute, wide=wide,
                preferred=preferred, precision=self.params["precision"],
            )  # fmt: skip
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
        (x, x_axes), (y, y_axes) = (other, factor) if self.place else (factor, other)
        precision = self.params["precision"]
        return contract_labelled(
            x, x_axes, y, y_axes, keep, precision=precision, preferred=preferred
        )


def _only_second_is_complex(x, y) -> bool:
    return jnp.iscomplexobj(y) and not jnp.iscomplexobj(x)


class ConvUse(Use):
    """`conv_general_dilated` with the kernel on the right, of any spatial rank and groups.

    A convolution with `a` to r channels, then a product with `b` at each position; for the gradient
    of a convolution, where the kernel's outputs are contracted, the other way round.
    """

    def has_form(self) -> bool:
        return self.place == 1

    @property
    def _spec(self):
        return self.params["dimension_numbers"]

    @property
    def out_axis(self) -> int:
        return self._spec.rhs_spec[0]

    @property
    def out_axes(self) -> list:
        feature = self._spec.out_spec[1]
        return [self.out_axis if n == feature else ("x", n) for n in range(self.other.ndim)]

    def with_gain(self, gain, axes) -> Self | None:
        if axes != [self._spec.rhs_spec[1]] or self.params["feature_group_count"] != 1:
            return None
        feature = self._spec.lhs_spec[1]
        labels = [axes[0] if n == feature else ("x", n) for n in range(self.other.ndim)]
        return self.with_other_times(labels, gain, axes)

    def low_rank(self, weight: LoRAWeight):
        roles, (out_axis, in_axis, *spatial) = weight.current_roles, self._spec.rhs_spec
        groups = self.params["feature_group_count"]
        features = {roles[out_axis], roles[in_axis]}
        if (
            self.params["batch_group_count"] != 1
            or features != {"i", "o"}
            or any(roles[axis] != "i" for axis in spatial)
            or (groups > 1 and roles[out_axis] == "i")
        ):
            return None
        x = weight.dropped(self.other, self.uses)
        wide = float32_or_wider(x.dtype)
        scale = jnp.asarray(weight.scale, wide)
        a, b = weight.a.astype(x.dtype), weight.b.astype(x.dtype)
        a_axes = weight.side_axes("a")
        of_outputs = out_axis if roles[out_axis] == "o" else in_axis
        order = [a_axes.index(RANK if axis == of_outputs else axis) for axis in range(len(roles))]
        if roles[out_axis] == "o":
            kernel = lax.transpose(a, order)
            # Every group of inputs meets the same `a`, and has r channels of its own.
            kernel = jnp.concatenate([kernel] * groups, axis=out_axis) if groups > 1 else kernel
            hidden = (self.convolved(x, kernel, wide) * scale).astype(x.dtype)
            b = b.reshape(b.shape[0], groups, -1)
            return self.by_group("...gr,rgo->...go", hidden, b, (groups,), wide)
        feature = self._spec.lhs_spec[1]
        hidden = jnp.einsum(
            "...o,ro->...r", jnp.moveaxis(x, feature, -1), b,
            precision=self.params["precision"], preferred_element_type=wide,
        )  # fmt: skip
        hidden = jnp.moveaxis((hidden * scale).astype(x.dtype), -1, feature)
        return self.convolved(hidden, lax.transpose(a, order), wide)

    def by_group(self, equation: str, hidden, b, groups: tuple[int, ...], preferred):
        """A product of `hidden`, whose features are (groups…, r), with `b` at each position."""
        feature = self._spec.out_spec[1]
        hidden = jnp.moveaxis(hidden, feature, -1)
        hidden = hidden.reshape(*hidden.shape[:-1], *groups, -1)
        delta = jnp.einsum(
            equation, hidden, b,
            precision=self.params["precision"], preferred_element_type=preferred,
        )  # fmt: skip
        delta = delta.reshape(*delta.shape[: -1 - len(groups)], -1)
        return jnp.moveaxis(delta, -1, feature)

    def convolved(self, x, kernel, preferred):
        """The convolution of other inputs by another kernel, as this equation has it."""
        names = (
            "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
            "feature_group_count", "precision",
        )  # fmt: skip
        options = {name: self.params[name] for name in names}
        return lax.conv_general_dilated(x, kernel, preferred_element_type=preferred, **options)


class RaggedUse(Use):
    """`ragged_dot`: rows sorted by group, each group with its own matrix of a stacked kernel.

    The others are the rows and the sizes of the groups.
    """

    def has_form(self) -> bool:
        return self.place == 1 and jaxprs.ragged_contraction(self.eqn) is not None

    @property
    def contracted(self) -> int:
        axis = jaxprs.ragged_contraction(self.eqn)
        assert axis is not None  # `has_form`
        return axis

    @property
    def out_axes(self) -> list:
        return [("x", 0), 3 - self.contracted]

    def gain_on_outputs(self, gain, axes):
        return self._by_row(gain, axes, 3 - self.contracted)

    def with_gain(self, gain, axes) -> Self | None:
        by_row = self._by_row(gain, axes, self.contracted)
        return by_row and self.with_other_times([("x", 0), self.contracted], *by_row)

    def _by_row(self, gain, axes, place: int):
        """A gain of each group's matrix along one of its axes, as a gain of the rows."""
        if sorted(axes) != [0, place]:
            return None
        rows, sizes = self.others
        gain = permute(gain, [axes.index(0), axes.index(place)])
        by_row = jnp.repeat(gain, sizes, axis=0, total_repeat_length=rows.shape[0])
        return by_row, [("x", 0), place]

    def low_rank(self, weight: LoRAWeight):
        roles, (rows, sizes) = weight.current_roles, self.others
        if roles[0] != "s" or set(roles[1:]) != {"i", "o"}:
            return None
        if _only_second_is_complex(rows, weight.a):
            return None
        compute = rows.dtype
        wide = float32_or_wider(compute)
        scaled = weight.scaled(weight.a.astype(wide), weight.side_axes("a"))
        a, b = scaled.astype(compute), weight.b.astype(compute)
        if roles[self.contracted] == "o":  # the transposed use
            a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
        options = {"precision": self.params["precision"], "preferred_element_type": wide}
        x = weight.dropped(rows, self.uses)
        hidden = lax.ragged_dot(x, a, sizes, **options)
        return lax.ragged_dot(hidden.astype(compute), b, sizes, **options)
