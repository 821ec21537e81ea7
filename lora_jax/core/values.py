"""`AdaptedValue`: what `lift` knows of the values that sit where plain arrays sat.

It can always be materialised and may have cheaper ways through some primitives. Its `kernel` may be
an adapted value itself: that is how several adapters sit on one weight.

Each axis of the kernel has a role: "i" (contracted with the input), "o" (in the output) or "s"
(stacked: one matrix per index, as in scanned layers or experts). What a value holds besides its
kernel has axes of its own, in the kernel's order: `a (stack…, in…, r)`, `b (stack…, r, out…)`,
`scale (stack…)`, `gain (stack…, out…)`. Roles are counted from the end, because scan and vmap take
leading axes away without telling us.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jaxprs
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import not_a_parameter
from lora_jax.core.explicit import within
from lora_jax.core.labelled_dot import permute, strided_slice, times_side
from lora_jax.core.misuse import refuses_use
from lora_jax.core.reshapes import reshape_roles
from lora_jax.core.trees import Stored

RANK = "r"


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that is linear in its operand number `place`, a kernel; see `core/uses.py`.

    `others` are the other operands in their order; `uses` counts earlier uses of the weight, so
    that dropout differs from use to use. A gain along some axes of the kernel is `(side, axes)` on
    the result by `gain_on_outputs`, or, where the equation contracts its axes, on the other
    operand: `with_gain` is the same use with that one scaled. Either may be None.
    """

    eqn: Any
    others: tuple[Any, ...]
    place: int
    kernel_shape: tuple[int, ...]
    uses: int = 0

    @property
    def out_axes(self) -> list:
        """For each axis of the result the kernel's axis that it is, or another label."""
        raise NotImplementedError

    @property
    def other(self) -> jax.Array:
        return self.others[0]

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        return self.eqn.outvars[0].aval

    def has_form(self) -> bool:
        """Whether the equation is one that this class describes."""
        return True

    def bind(self, kernel: jax.Array) -> jax.Array:
        """The equation with a plain kernel."""
        operands = list(self.others)
        operands.insert(self.place, kernel)
        return jaxprs.bind(self.eqn, operands)[0]

    def low_rank(self, weight: Any) -> jax.Array | None:
        """The equation with the ΔW of a `LoRAWeight`; None where it has no low-rank form."""
        raise NotImplementedError

    def gain_on_outputs(self, gain, axes: list) -> tuple[jax.Array, list] | None:
        return (gain, axes) if all(axis in self.out_axes for axis in axes) else None

    def with_gain(self, gain, axes: list) -> Self | None:
        return None

    def with_other_times(self, other_axes: list, gain, axes: list) -> Self:
        """The use with its first other operand, whose axes have these labels, times a gain."""
        scaled = times_side(self.other, other_axes, gain, axes)
        return dataclasses.replace(self, others=(scaled, *self.others[1:]))


def _outside_lift(value: AdaptedValue) -> str:
    return (
        f"{value.path!r} is a {type(value).__name__}, which plain JAX code cannot use; "
        "call lora_jax.lift(apply)(…) in place of apply(…), or merge first"
    )


@refuses_use(_outside_lift)
@dataclasses.dataclass(frozen=True)
class AdaptedValue:
    """A pytree node that stands for one array of the model.

    Fields: `kernel`, the array beneath, or another adapted value; `roles`, a letter for each of its
    axes; `path`, the parameter's. `SIDES` names the fields that follow the kernel through casts,
    transposes, reshapes and slices, with the roles of their axes ("sir": stacked, input, rank).
    Every method that returns a value returns None where this one cannot follow; `lift` then
    materialises.
    """

    kernel: Any
    roles: str = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    SIDES: ClassVar[dict[str, str]] = {}

    def use(self, use: Use) -> jax.Array | None:
        """The result of an equation that is linear in this value."""
        raise NotImplementedError

    def materialise(self) -> jax.Array:
        """The plain array that this value stands for, in the kernel's dtype; some have none."""
        raise not_a_parameter(f"the adapter of {self.path!r}")

    @property
    def base(self) -> jax.Array | jax.ShapeDtypeStruct:
        """The frozen array beneath all adapters; of a quantized one its shape and dtype alone."""
        return self.kernel.base if is_adapted(self.kernel) else self.kernel

    def base_array(self) -> jax.Array:
        """The frozen array beneath all adapters; where it is stored in another form, expanded."""
        return self._beneath(lambda kernel: kernel, "base_array")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def size(self) -> int:
        return self.base.size

    @property
    def dtype(self):
        return self.base.dtype

    def expanded(self, dtype) -> jax.Array:
        """The plain array in another dtype, summed in float32 or wider and rounded once."""
        wide = float32_or_wider(self.dtype, dtype, *self._side_dtypes())
        return self.on_base(lambda kernel: kernel.astype(wide)).materialise().astype(dtype)

    def _side_dtypes(self) -> list[Any]:
        beneath = self._beneath(lambda kernel: [], "_side_dtypes")
        return [x.dtype for x in self.sides().values()] + beneath

    @property
    def is_stored(self) -> bool:
        """Whether the frozen array is stored in another form."""
        return is_adapted(self.kernel) and self.kernel.is_stored

    @property
    def is_random(self) -> bool:
        """Whether adapter dropout is on here or beneath."""
        return is_adapted(self.kernel) and self.kernel.is_random

    @property
    def current_roles(self) -> str:
        return self.roles[len(self.roles) - self.ndim :]

    def axes(self, role: str) -> list[int]:
        return [axis for axis, r in enumerate(self.current_roles) if r == role]

    def side_axes(self, name: str) -> list:
        """The kernel axis (or RANK) that each axis of a side array stands for."""
        return [
            axis
            for role in self.SIDES[name]
            for axis in ([RANK] if role == RANK else self.axes(role))
        ]

    def sides(self) -> dict[str, Any]:
        """The side arrays that are there."""
        found = {name: getattr(self, name) for name in self.SIDES}
        return {name: x for name, x in found.items() if x is not None}

    def _beneath(self, plain: Callable[[jax.Array], Any], method: str, *args: Any) -> Any:
        """What `method(*args)` makes of an adapted value beneath, `plain` of the array itself."""
        beneath = self.kernel
        return getattr(beneath, method)(*args) if is_adapted(beneath) else plain(beneath)

    def _on_kernel(self, kernel: Any, **sides: Any) -> Self | None:
        """The value over what its kernel became; None where that could not follow."""
        return None if kernel is None else dataclasses.replace(self, kernel=kernel, **sides)

    def on_base(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """The value with `change` applied to the frozen array, its shape kept."""
        return dataclasses.replace(self, kernel=self._beneath(change, "on_base", change))

    def marked(self, mark: Callable[[jax.Array], jax.Array]) -> Self:
        """The value with a mark (a placement, a name) on the frozen array."""
        return dataclasses.replace(self, kernel=self._beneath(mark, "marked", mark))

    def convert(self, dtype) -> Self | None:
        # Side arrays keep their precision: they are cast once, at the product.
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        cast_to = functools.partial(lax.convert_element_type, new_dtype=dtype)
        return self._on_kernel(self._beneath(cast_to, "convert", dtype))

    def scan_axis_is_stack(self) -> bool:
        is_stack = self._beneath(lambda kernel: True, "scan_axis_is_stack")
        return self.current_roles[:1] == "s" and is_stack

    def along_first_axis(self) -> Self:
        """The value with its first axis, whatever its role, as a stack axis: for a scan along it.

        What holds that axis (A along the inputs, B and a gain along the outputs) is cut with it,
        and the rest is there whole for each index: ΔW[n] = scale · a[n] @ b.
        """

        def leading(axes, x):
            if 0 in axes:
                return jnp.moveaxis(x, axes.index(0), 0)
            return jnp.broadcast_to(jnp.asarray(x), (self.shape[0], *x.shape))

        kernel = self._beneath(lambda kernel: kernel, "along_first_axis")
        sides = {name: leading(self.side_axes(name), x) for name, x in self.sides().items()}
        return dataclasses.replace(self, kernel=kernel, roles="s" + self.current_roles[1:], **sides)

    def transpose(self, permutation) -> Self | None:
        """The value with its axes in this order."""
        roles = "".join(self.current_roles[n] for n in permutation)

        def order(name):
            old = self.side_axes(name)
            axes = {
                role: [n for n in permutation if self.current_roles[n] == role] for role in "sio"
            }
            axes[RANK] = [RANK]
            return [old.index(axis) for role in self.SIDES[name] for axis in axes[role]]

        kernel = self._beneath(
            lambda x: lax.transpose(x, permutation), "transpose", tuple(permutation)
        )
        sides = {name: permute(x, order(name)) for name, x in self.sides().items()}
        return self._on_kernel(kernel, roles=roles, **sides)

    def reshape(self, shape) -> Self | None:
        """Follows a reshape that merges or splits axes of one role."""
        roles = reshape_roles(self.shape, shape, self.current_roles)
        if roles is None:
            return None
        sizes = {r: [n for n, role in zip(shape, roles, strict=True) if role == r] for r in "sio"}

        def reshaped(name, x):
            rank = [x.shape[n] for n, axis in enumerate(self.side_axes(name)) if axis == RANK]
            by_role = {**sizes, RANK: rank}
            return x.reshape([size for role in self.SIDES[name] for size in by_role[role]])

        kernel = self._beneath(lambda x: lax.reshape(x, shape), "reshape", shape)
        sides = {name: reshaped(name, x) for name, x in self.sides().items()}
        return self._on_kernel(kernel, roles=roles, **sides)

    def _each_along(self, change: Callable[[Any, list], Any], method: str, *args) -> Self | None:
        """The value with `change(array, the kernel's axis of each of its own)` of its arrays."""
        kernel = self._beneath(lambda x: change(x, list(range(x.ndim))), method, *args)
        sides = {name: change(x, self.side_axes(name)) for name, x in self.sides().items()}
        return self._on_kernel(kernel, **sides)

    def slice_axes(self, starts, sizes, strides=None) -> Self | None:
        """A slice, each array cut where it holds the axis: static if `strides` is given, else
        dynamic."""

        def cut(x, x_axes):
            size = [x.shape[n] if axis == RANK else sizes[axis] for n, axis in enumerate(x_axes)]
            if strides is not None:
                begin = [0 if axis == RANK else starts[axis] for axis in x_axes]
                step = [1 if axis == RANK else strides[axis] for axis in x_axes]
                return strided_slice(x, begin, size, step)
            # dynamic_slice wants every start in one integer type.
            zero = lax.full_like(starts[0], 0)
            begin = [zero if axis == RANK else starts[axis] for axis in x_axes]
            return lax.dynamic_slice(x, begin, size)

        return self._each_along(cut, "slice_axes", starts, sizes, strides)

    def reverse(self, dimensions) -> Self | None:
        """The value with these axes the other way round."""

        def flipped(x, x_axes):
            return lax.rev(x, [n for n, axis in enumerate(x_axes) if axis in dimensions])

        return self._each_along(flipped, "reverse", dimensions)

    def times(self, factor, bind: Callable[[jax.Array], jax.Array]) -> Self | None:
        """The value times a scalar; `bind` is the equation that multiplies the frozen array."""
        return self._on_kernel(self._beneath(bind, "times", factor, bind))

    def moved(self, sign: int, bind: Callable[[jax.Array], jax.Array]) -> Self | None:
        """The value, or minus it, plus an array; `bind` is that equation on the frozen array."""
        return None

    def pad(self, value, config) -> Self | None:
        """The value with `value` around it, as `lax.pad` has it."""
        return None


def is_adapted(value: Any) -> bool:
    return isinstance(value, AdaptedValue)


def is_bound(value: Any) -> bool:
    """Whether an adapter sits here, and not just an array that is stored in another form."""
    return is_adapted(value) and not isinstance(value, Stored)


def materialise(value: Any) -> Any:
    """The plain array that `value` stands for; plain values pass."""
    return within(type(value).materialise, value, like=value.base) if is_adapted(value) else value


def use_beneath(kernel: Any, use: Use) -> jax.Array | None:
    """The result of a use of what lies beneath: the frozen array, or another adapted value."""
    return kernel.use(use) if is_adapted(kernel) else use.bind(kernel)
