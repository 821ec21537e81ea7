"""Adapted values: what sits in the params tree where a plain array sat.

`AdaptedValue` is what `lift` knows: a value that can always be materialised and may have cheaper
ways through some primitives. `LoRAWeight` is the low-rank one: the frozen `kernel` and the factors
of ΔW = scale · a @ b, which is never formed where a primitive has a low-rank rule.

Each axis of the kernel has a role: "i" (contracted with the input), "o" (in the output) or "s"
(stacked: one matrix per index, as in scanned layers or experts). The factors hold their axes in
the kernel's order: `a (stack…, in…, r)`, `b (stack…, r, out…)`, `scale (stack…)`. Roles are counted
from the end, because scan and vmap take leading axes away without telling us.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.contract import contract
from lora_jax.core.reshapes import reshape_roles
from lora_jax.core.thin import is_thin_case, thin_products

RANK = "r"


class AdaptedValue:
    """A pytree node that stands for one array of the model.

    Subclasses give `kernel` (the array whose shape and dtype the model sees), `path`, and
    `materialise`. Every other method is a way to stay cheap: it returns the new value, or None
    where this value cannot follow, and `lift` then materialises.
    """

    kernel: jax.Array
    path: str

    def materialise(self) -> jax.Array:
        raise TypeError(f"{type(self).__name__} cannot be materialised")

    def convert(self, dtype) -> AdaptedValue | None:
        return None

    def transpose(self, permutation) -> AdaptedValue | None:
        return None

    def reshape(self, shape) -> AdaptedValue | None:
        return None

    def slice_axes(self, starts, sizes, strides) -> AdaptedValue | None:
        return None

    def with_kernel(self, kernel) -> AdaptedValue | None:
        return None

    def scan_axis_is_stack(self) -> bool:
        return False

    def dot(self, other, dimension_numbers, *, kernel_side: str, bind, uses: int, precision=None):
        return None


def is_adapted(value: Any) -> bool:
    return isinstance(value, AdaptedValue)


def materialise(value: Any) -> Any:
    """The plain array that `value` stands for; plain values pass."""
    return value.materialise() if is_adapted(value) else value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight(AdaptedValue):
    """`kernel + scale * a @ b`, kept apart.

    Fields: `kernel` any float dtype; `a (stack…, in…, r)`, `b (stack…, r, out…)`; `scale (stack…)`
    float, data and not trained; `key` None or random keys `(stack…)`: present means that adapter
    dropout is on; `dropout` None or `(stack…)` float, the probability of dropping an entry of the
    adapter's input (Hu et al. 2021 code: on the adapter path only), data like the scale, so that
    adapters which differ in it share a program; `roles` one letter per kernel axis.
    """

    kernel: Any
    a: Any
    b: Any
    scale: Any
    key: Any
    roles: str = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    dropout: Any = None

    @property
    def current_roles(self) -> str:
        return self.roles[len(self.roles) - self.kernel.ndim :]

    def axes(self, role: str) -> list[int]:
        return [axis for axis, r in enumerate(self.current_roles) if r == role]

    def factor_axes(self) -> tuple[list, list]:
        """The kernel axis (or RANK) that each axis of `a`, and of `b`, stands for."""
        stack = self.axes("s")
        return [*stack, *self.axes("i"), RANK], [*stack, RANK, *self.axes("o")]

    def delta(self, *, dtype=None) -> jax.Array:
        """ΔW = scale · a @ b in the kernel's shape, float32 or wider.

        Uses the highest matmul precision: a merged weight is stored once and used for ever.
        """
        dtype = dtype or jnp.promote_types(jnp.promote_types(self.a.dtype, jnp.float32), self.dtype)
        a_axes, b_axes = self.factor_axes()
        scaled = self._scaled(self.a.astype(dtype), a_axes)
        order = list(range(self.kernel.ndim))
        highest = lax.Precision.HIGHEST
        return contract(scaled, a_axes, self.b.astype(dtype), b_axes, order, precision=highest)

    @property
    def dtype(self):
        return self.kernel.dtype

    def materialise(self) -> jax.Array:
        delta = self.delta()
        return (self.kernel.astype(delta.dtype) + delta).astype(self.kernel.dtype)

    def _scaled(self, x, x_axes):
        """`x * scale`, the scale's stack axes matched to those of `x`."""
        where = [x_axes.index(axis) for axis in self.axes("s")]
        shape = [1] * x.ndim
        for axis, size in zip(where, self.scale.shape, strict=True):
            shape[axis] = size
        in_order = sorted(range(len(where)), key=where.__getitem__)
        scale = lax.reshape(_permute(jnp.asarray(self.scale), in_order), shape)
        # lax, not jnp: this runs once per product while the user waits for a trace.
        return lax.mul(x, lax.broadcast_in_dim(_cast(scale, x.dtype), x.shape, range(x.ndim)))

    def with_kernel(self, kernel) -> LoRAWeight:
        return dataclasses.replace(self, kernel=kernel)

    def convert(self, dtype) -> LoRAWeight | None:
        # The factors keep their precision: they are cast once, at the product.
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.with_kernel(lax.convert_element_type(self.kernel, dtype))

    def scan_axis_is_stack(self) -> bool:
        return self.current_roles[:1] == "s"

    def transpose(self, permutation) -> LoRAWeight:
        a_axes, b_axes = self.factor_axes()
        roles = self.current_roles
        stack = [axis for axis in permutation if roles[axis] == "s"]
        a_order = [*stack, *(axis for axis in permutation if roles[axis] == "i"), RANK]
        b_order = [*stack, RANK, *(axis for axis in permutation if roles[axis] == "o")]
        old_stack = self.axes("s")
        stack_order = [old_stack.index(axis) for axis in stack]
        return dataclasses.replace(
            self,
            kernel=lax.transpose(self.kernel, permutation),
            a=_permute(self.a, [a_axes.index(axis) for axis in a_order]),
            b=_permute(self.b, [b_axes.index(axis) for axis in b_order]),
            scale=_permute(self.scale, stack_order),
            key=None if self.key is None else _permute(self.key, stack_order),
            dropout=None if self.dropout is None else _permute(self.dropout, stack_order),
            roles="".join(roles[axis] for axis in permutation),
        )

    def reshape(self, shape) -> LoRAWeight | None:
        """Follows a reshape that merges or splits axes of one role; else None."""
        segments = reshape_roles(self.kernel.shape, shape, self.current_roles)
        if segments is None:
            return None
        roles = "".join(role for role, _ in segments)
        sizes = {r: [size for role, size in segments if role == r] for r in "sio"}
        rank = self.a.shape[-1]
        return dataclasses.replace(
            self,
            kernel=lax.reshape(self.kernel, shape),
            a=self.a.reshape(*sizes["s"], *sizes["i"], rank),
            b=self.b.reshape(*sizes["s"], rank, *sizes["o"]),
            scale=self.scale.reshape(sizes["s"]),
            key=None if self.key is None else self.key.reshape(sizes["s"]),
            dropout=None if self.dropout is None else self.dropout.reshape(sizes["s"]),
            roles=roles,
        )

    def slice_axes(self, starts, sizes, strides=None) -> LoRAWeight:
        """A slice, each factor cut where it holds the axis: static if `strides` is given, else
        dynamic."""

        def cut(x, x_axes):
            if x is None:
                return None
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

        a_axes, b_axes = self.factor_axes()
        return dataclasses.replace(
            self,
            kernel=cut(self.kernel, list(range(self.kernel.ndim))),
            a=cut(self.a, a_axes),
            b=cut(self.b, b_axes),
            scale=cut(self.scale, self.axes("s")),
            key=cut(self.key, self.axes("s")),
            dropout=cut(self.dropout, self.axes("s")),
        )

    def dot(self, other, dimension_numbers, *, kernel_side: str, bind, uses: int, precision=None):
        """`dot_general` with the kernel on one side: the frozen product as it was, plus
        (other · a) · b, whatever axes are contracted.

        `bind(lhs, rhs)` makes the frozen product with its operands in their original order: only
        so is a fresh adapter bit-equal to the base.
        """
        on_left = kernel_side == "lhs"
        base = bind(self.kernel, other) if on_left else bind(other, self.kernel)
        contracting, batch = dimension_numbers
        mine, theirs = (0, 1) if on_left else (1, 0)
        shared = [*zip(batch[theirs], batch[mine], strict=True)]
        shared += zip(contracting[theirs], contracting[mine], strict=True)
        labels = dict(shared)
        other_axes = [labels.get(axis, ("x", axis)) for axis in range(other.ndim)]

        kernel_free = [
            axis
            for axis in range(self.kernel.ndim)
            if axis not in contracting[mine] and axis not in batch[mine]
        ]
        other_free = [axis for axis in other_axes if isinstance(axis, tuple)]
        out = [*batch[mine], *(kernel_free + other_free if on_left else other_free + kernel_free)]

        a_axes, b_axes = self.factor_axes()
        first, second = (self.a, a_axes), (self.b, b_axes)
        contracts_out = any(self.current_roles[axis] == "o" for axis in contracting[mine])
        contracts_in = any(self.current_roles[axis] == "i" for axis in contracting[mine])
        if contracts_out and not contracts_in:  # the transposed use: a tied head, `x @ W.T`
            first, second = second, first

        x = self._dropped(other, uses)
        # Low-precision inputs meet the factors in their own dtype and accumulate in float32.
        compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else first[0].dtype
        wide = jnp.promote_types(compute, jnp.float32)
        preferred = base.dtype if jnp.issubdtype(base.dtype, jnp.inexact) else wide
        dtypes = {"compute": compute, "wide": wide, "preferred": preferred}
        where = (contracting[mine], batch[mine], contracting[theirs], other.ndim)
        if not on_left and is_thin_case(self.current_roles, *where):
            delta = thin_products(
                x,
                first[0],
                second[0],
                jnp.asarray(self.scale),
                first_is_a=first[0] is self.a,
                precision=precision,
                **dtypes,
            )
            return lax.add(base, _cast(lax.reshape(delta, base.shape), base.dtype))
        hidden, hidden_axes = _product(
            (_cast(first[0], compute), first[1]),
            (_cast(x, compute), other_axes),
            [*out, *second[1]],
            on_left=on_left,
            precision=precision,
            preferred=wide,
        )
        hidden = _cast(self._scaled(hidden, hidden_axes), compute)
        delta, delta_axes = _product(
            (_cast(second[0], compute), second[1]),
            (hidden, hidden_axes),
            out,
            on_left=on_left,
            precision=precision,
            preferred=preferred,
        )
        delta = _permute(delta, [delta_axes.index(axis) for axis in out])
        return lax.add(base, _cast(delta, base.dtype))

    def _dropped(self, x, uses: int):
        """Inverted dropout on the adapter's input; the mask differs at each use of the weight."""
        if self.key is None:
            return x
        # Matrices stacked in one kernel and used at once share the first one's mask and rate.
        key, rate = (leaf.reshape(-1)[0] for leaf in (self.key, jnp.asarray(self.dropout)))
        kept = 1.0 - rate
        keep = jax.random.bernoulli(jax.random.fold_in(key, uses), kept, x.shape)
        return jnp.where(keep, x / kept.astype(x.dtype), jnp.zeros_like(x))


def _product(factor, other, keep, *, on_left: bool, precision, preferred):
    """Contracts with the factor on its kernel's side; returns the result and its axes unsorted."""
    (x, x_axes), (y, y_axes) = (factor, other) if on_left else (other, factor)
    return contract(
        x, x_axes, y, y_axes, keep, precision=precision, preferred=preferred, transpose=False
    )


def _permute(x, permutation):
    return x if list(permutation) == list(range(x.ndim)) else lax.transpose(x, permutation)


def _cast(x, dtype):
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
