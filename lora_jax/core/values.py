"""`AdaptedValue`: what `lift` knows of the values that sit where plain arrays sat.

It can always be materialised and may have cheaper ways through some primitives. Its `kernel` may be
an adapted value itself: that is how several adapters sit on one weight.

Each axis of the kernel has a role: "i" (contracted with the input), "o" (in the output) or "s"
(stacked: one matrix per index, as in scanned layers or experts). What a value holds beside its
kernel has axes of its own, in the kernel's order: `a (stack…, in…, r)`, `b (stack…, r, out…)`,
`scale (stack…)`, `gain (stack…, out…)`. Roles are counted from the end, because scan and vmap take
leading axes away without telling us.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import not_a_parameter
from lora_jax.core.explicit import like_first, within
from lora_jax.core.misuse import refuses_use
from lora_jax.core.reshapes import reshape_roles
from lora_jax.core.trees import Stored

if TYPE_CHECKING:
    from lora_jax.core.weights import LoRAWeight

RANK = "r"


class Use(Protocol):
    """One equation that is linear in an adapted kernel; see `core/uses.py`."""

    out_axes: list  # for each axis of the result, the kernel's axis it is; or another label

    def bind(self, kernel: jax.Array) -> jax.Array: ...

    def low_rank(self, weight: LoRAWeight) -> jax.Array | None: ...

    def gain_on_outputs(self, gain: jax.Array, axes: list) -> tuple[jax.Array, list] | None: ...

    def with_gain(self, gain: jax.Array, axes: list) -> Use | None: ...


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
        return self.kernel.base_array() if is_adapted(self.kernel) else self.kernel

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
        beneath = self.kernel._side_dtypes() if is_adapted(self.kernel) else []
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

    def on_base(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """The value with `change` applied to the frozen array, its shape kept."""
        beneath = self.kernel
        changed = beneath.on_base(change) if is_adapted(beneath) else change(beneath)
        return dataclasses.replace(self, kernel=changed)

    def marked(self, mark: Callable[[jax.Array], jax.Array]) -> Self:
        """The value with a mark (a placement, a name) on the frozen array."""
        beneath = self.kernel
        changed = beneath.marked(mark) if is_adapted(beneath) else mark(beneath)
        return dataclasses.replace(self, kernel=changed)

    def convert(self, dtype) -> Self | None:
        # Side arrays keep their precision: they are cast once, at the product.
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        beneath = self.kernel
        if is_adapted(beneath):
            return self._followed(beneath.convert(dtype), {})
        return dataclasses.replace(self, kernel=lax.convert_element_type(beneath, dtype))

    def scan_axis_is_stack(self) -> bool:
        beneath = self.kernel
        return self.current_roles[:1] == "s" and (
            not is_adapted(beneath) or beneath.scan_axis_is_stack()
        )

    def _followed(self, kernel, sides, roles=None) -> Self | None:
        if kernel is None:
            return None
        roles = self.roles if roles is None else roles
        return dataclasses.replace(self, kernel=kernel, roles=roles, **sides)

    def transpose(self, permutation) -> Self | None:
        """The value with its axes in this order."""
        permutation = list(permutation)

        def order(name):
            old = self.side_axes(name)
            kept = [axis for axis in permutation if axis in old]
            by_role = [
                axis
                for role in self.SIDES[name]
                for axis in (
                    [RANK] if role == RANK else [n for n in kept if self.current_roles[n] == role]
                )
            ]
            return [old.index(axis) for axis in by_role]

        kernel = (
            self.kernel.transpose(permutation)
            if is_adapted(self.kernel)
            else lax.transpose(self.kernel, permutation)
        )
        sides = {name: permute(x, order(name)) for name, x in self.sides().items()}
        return self._followed(kernel, sides, "".join(self.current_roles[n] for n in permutation))

    def reshape(self, shape) -> Self | None:
        """Follows a reshape that merges or splits axes of one role."""
        segments = reshape_roles(self.shape, shape, self.current_roles)
        if segments is None:
            return None
        sizes = {r: [size for role, size in segments if role == r] for r in "sio"}

        def reshaped(name, x):
            rank = [x.shape[n] for n, axis in enumerate(self.side_axes(name)) if axis == RANK]
            by_role = {**sizes, RANK: rank}
            return x.reshape([size for role in self.SIDES[name] for size in by_role[role]])

        kernel = (
            self.kernel.reshape(shape)
            if is_adapted(self.kernel)
            else lax.reshape(self.kernel, shape)
        )
        sides = {name: reshaped(name, x) for name, x in self.sides().items()}
        return self._followed(kernel, sides, "".join(role for role, _ in segments))

    def slice_axes(self, starts, sizes, strides=None) -> Self | None:
        """A slice, each array cut where it holds the axis: static if `strides` is given, else
        dynamic."""

        def cut(x, x_axes):
            size = [x.shape[n] if axis == RANK else sizes[axis] for n, axis in enumerate(x_axes)]
            if strides is not None:
                begin = [0 if axis == RANK else starts[axis] for axis in x_axes]
                step = [1 if axis == RANK else strides[axis] for axis in x_axes]
                ends = [b + (n - 1) * s + 1 for b, n, s in zip(begin, size, step, strict=True)]
                return lax.slice(x, begin, ends, step)
            # dynamic_slice wants every start in one integer type.
            zero = lax.full_like(starts[0], 0)
            begin = [zero if axis == RANK else starts[axis] for axis in x_axes]
            return lax.dynamic_slice(x, begin, size)

        kernel = (
            self.kernel.slice_axes(starts, sizes, strides)
            if is_adapted(self.kernel)
            else cut(self.kernel, list(range(self.ndim)))
        )
        return self._followed(
            kernel, {name: cut(x, self.side_axes(name)) for name, x in self.sides().items()}
        )

    def reverse(self, dimensions) -> Self | None:
        """The value with these axes the other way round."""

        def flipped(x, x_axes):
            return lax.rev(x, [n for n, axis in enumerate(x_axes) if axis in dimensions])

        kernel = (
            self.kernel.reverse(dimensions)
            if is_adapted(self.kernel)
            else lax.rev(self.kernel, dimensions)
        )
        return self._followed(
            kernel, {name: flipped(x, self.side_axes(name)) for name, x in self.sides().items()}
        )

    def times(self, factor, bind: Callable[[jax.Array], jax.Array]) -> Self | None:
        """The value times a scalar; `bind` is the equation that multiplies the frozen array."""
        beneath = self.kernel
        kernel = beneath.times(factor, bind) if is_adapted(beneath) else bind(beneath)
        return self._followed(kernel, {})

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


def placed(value: Any, put: Callable, put_side: Callable) -> Any:
    """The value with the arrays it is made of put elsewhere: the frozen one, and its sides."""
    if not is_adapted(value):
        return put(value)
    if isinstance(value, Stored):
        return value.marked(put)
    sides = {name: put_side(x) for name, x in value.sides().items()}
    return dataclasses.replace(value, kernel=placed(value.kernel, put, put_side), **sides)


def use_beneath(kernel: Any, use: Use) -> jax.Array | None:
    """The result of a use of what lies beneath: the frozen array, or another adapted value."""
    return kernel.use(use) if is_adapted(kernel) else use.bind(kernel)


@like_first
def times_side(x, x_axes, side, side_axes):
    """`x` times an array that has some of its labelled axes, in `x`'s dtype."""
    where = [x_axes.index(axis) for axis in side_axes]
    shape = [1] * x.ndim
    for axis, size in zip(where, side.shape, strict=True):
        shape[axis] = size
    in_order = sorted(range(len(where)), key=where.__getitem__)
    side = lax.reshape(permute(side, in_order), shape)
    # lax, not jnp: this runs once per product while the user waits for a trace.
    return lax.mul(x, lax.broadcast_in_dim(cast(side, x.dtype), x.shape, range(x.ndim)))


def permute(x, permutation):
    """`x` with its axes in this order; itself if they are."""
    return x if list(permutation) == list(range(x.ndim)) else lax.transpose(x, permutation)


def cast(x, dtype):
    """`x` in this dtype; itself if it is."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
