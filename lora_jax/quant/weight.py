"""`NF4Weight`: a frozen kernel kept in four bits, in the params tree where the array sat.

A model and an adapter see an array of the original shape and dtype. The four bits become one where
an equation uses it, inside a `jax.checkpoint`, and again in the backward pass, so that no
dequantised kernel waits from one to the other and no stack of them is ever alive.

The matrix of each layer of a stack is flattened as torch's `Linear` has it, outputs first, so that
the bytes are those of `bitsandbytes` for the same checkpoint. Where whole blocks fit into the
inputs, codes are kept as (stack…, out, in / 2), so that either side can be split over devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.labelled_dot import strided_slice
from lora_jax.core.trees import Stored
from lora_jax.core.values import AdaptedValue, Use
from lora_jax.quant import nf4


@dataclasses.dataclass(frozen=True)
class View:
    """One step from the stored array to what the model made of it: a cast, a transpose, …"""

    function: Callable[..., jax.Array]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x, **dict(self.options))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4Weight(AdaptedValue, Stored):
    """A kernel in NF4 (see `quant.nf4`), dequantised where it is used.

    Fields: `kernel` codes, uint8 (stack…, rows, columns / 2), two per byte; `scales` (stack…, rows,
    columns / 64), float32, or uint8 with `block_scales` (stack…, blocks) and `mean` (stack…)
    float32 (double quantisation); `matrix` the sizes of the kernel's other axes in their order;
    `stored_dtype` what `dequantize` gives. `roles` and `path` as of any adapted value.
    """

    scales: Any
    block_scales: Any = None
    mean: Any = None
    matrix: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stored_dtype: Any = dataclasses.field(metadata={"static": True})
    views: tuple[View, ...] = dataclasses.field(default=(), metadata={"static": True})
    seen: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack axes, which lead."""
        return tuple(self.kernel.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        if self.seen is not None and self.seen[0] is not None:
            return self.seen[0]
        return (*self.stack, *self.matrix)

    @property
    def dtype(self):
        return jnp.dtype(self.stored_dtype if self.seen is None else self.seen[1])

    @property
    def base(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def is_stored(self) -> bool:
        return True

    def base_array(self) -> jax.Array:
        return self.materialise()

    @property
    def nbytes(self) -> int:
        """What is kept: codes, scales and theirs."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def arrays(self) -> dict[str, Any]:
        """The arrays that are kept, by name."""
        named = {"codes": self.kernel, "scales": self.scales}
        more = {"block_scales": self.block_scales, "mean": self.mean}
        return named | {name: x for name, x in more.items() if x is not None}

    def layer(self, index: int) -> NF4Weight:
        """One of a stack's."""
        return jax.tree.map(lambda x: x[index], self)

    def dequantize(self) -> jax.Array:
        """The plain array, in the dtype it had before: `CODEBOOK[code] · scale`, rounded once."""
        scales = self.scales
        if self.mean is not None:
            flat = scales.reshape(*self.stack, -1)
            scales = nf4.decode_scales(flat, self.block_scales, self.mean).reshape(scales.shape)
        values = nf4.decode(nf4.unpack(self.kernel), scales).reshape(*self.stack, -1)
        values = values[..., : math.prod(self.matrix)].astype(self.stored_dtype)
        order, sizes = _outputs_first(self.roles, self.matrix)
        values = values.reshape(*self.stack, *sizes)
        back = [len(self.stack) + order.index(axis) for axis in range(len(order))]
        return lax.transpose(values, (*range(len(self.stack)), *back))

    def materialise(self) -> jax.Array:
        x = self.dequantize()
        for view in self.views:
            x = view(x)
        return x

    def use(self, use: Use) -> jax.Array | None:
        return jax.checkpoint(lambda packed: use.bind(packed.materialise()))(self)

    def on_base(self, change) -> NF4Weight:
        return self._viewed(change)

    def marked(self, mark) -> NF4Weight:
        return self  # where an array lies, or what it is called, says nothing of its four bits

    def convert(self, dtype) -> NF4Weight | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self._viewed(lax.convert_element_type, new_dtype=jnp.dtype(dtype))

    def scan_axis_is_stack(self) -> bool:
        return bool(self.stack) and self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the stack axes still lead, as they were: the model only cast it."""
        return self.seen is None or self.seen[0] is None

    def _viewed(self, function: Callable[..., jax.Array], **options: Any) -> NF4Weight:
        view = View(function, tuple(options.items()))
        after = jax.eval_shape(view, self.base)
        kept = self._is_whole() and function is lax.convert_element_type
        seen = (None if kept else tuple(after.shape), after.dtype)
        return dataclasses.replace(self, views=(*self.views, view), seen=seen)

    def transpose(self, permutation) -> NF4Weight | None:
        return self._viewed(lax.transpose, permutation=tuple(permutation))

    def reshape(self, shape) -> NF4Weight | None:
        shape, ones = tuple(shape), len(self.shape) - len(tuple(shape))
        if self._is_whole() and 0 < ones <= len(self.stack) and self.shape == (1,) * ones + shape:
            return self._on_stack(lambda x: x.reshape(x.shape[ones:]))
        return self._viewed(lax.reshape, new_sizes=shape)

    def slice_axes(self, starts, sizes, strides=None) -> NF4Weight | None:
        count = len(self.stack)
        if self._is_whole() and tuple(sizes[count:]) == self.shape[count:] and count:
            return self._on_stack(lambda x: _cut(x, starts[:count], sizes[:count], strides))
        if strides is None:
            return None
        starts, sizes, strides = map(tuple, (starts, sizes, strides))
        return self._viewed(strided_slice, starts=starts, sizes=sizes, strides=strides)

    def _on_stack(self, change) -> NF4Weight:
        """Every array with its stack axes changed alike."""
        return jax.tree.map(change, self)

    def reverse(self, dimensions) -> NF4Weight | None:
        if self._is_whole() and max(dimensions, default=0) < len(self.stack):
            return self._on_stack(lambda x: lax.rev(x, dimensions))
        return self._viewed(lax.rev, dimensions=tuple(dimensions))

    def times(self, factor, bind) -> None:
        return None  # the factor is data, and a view is not


def _cut(x, starts, sizes, strides):
    """The stack axes of `x` cut, the others whole."""
    rest = x.ndim - len(starts)
    whole = (*sizes, *x.shape[len(starts) :])
    if strides is None:
        zeros = [lax.full_like(starts[0], 0)] * rest
        return lax.dynamic_slice(x, [*starts, *zeros], whole)
    strides = [*strides[: len(starts)], *[1] * rest]
    return strided_slice(x, [*starts, *[0] * rest], whole, strides)


def _outputs_first(roles: str, matrix: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The matrix axes in the order of the flattened one, outputs then inputs, and their sizes."""
    own = roles[len(roles) - len(matrix) :]
    order = [n for n, role in enumerate(own) if role == "o"]
    order += [n for n, role in enumerate(own) if role != "o"]
    return order, [matrix[n] for n in order]


def encode_kernel(
    kernel: jax.Array, roles: str, path: str, *, double_quant: bool, dtype: Any = None
) -> NF4Weight:
    """The NF4 value of a kernel whose stack axes lead: one matrix for each of their indices.

    `dtype` is what it dequantises to, the kernel's own if None.
    """
    count = roles.count("s")
    if "s" in roles[count:] or len(roles) != kernel.ndim:
        raise ValueError(f"roles {roles!r} of {path!r} do not lead with its stack axes")
    stack, matrix = kernel.shape[:count], tuple(kernel.shape[count:])
    order, _ = _outputs_first(roles, matrix)
    flat = lax.transpose(kernel, (*range(count), *(count + n for n in order))).reshape(*stack, -1)
    columns = math.prod(n for n, role in zip(matrix, roles[count:], strict=True) if role != "o")
    if columns % nf4.BLOCK:  # blocks run on from one row into the next
        short = -flat.shape[-1] % nf4.BLOCK
        flat = jnp.pad(flat, [*[(0, 0)] * count, (0, short)])
        columns = flat.shape[-1]
    codes, scales = nf4.encode(flat)
    shaped = lambda x, part: x.reshape(*stack, -1, columns // part)  # noqa: E731
    more = {}
    if double_quant:
        scales, more["block_scales"], more["mean"] = nf4.encode_scales(scales)
    return NF4Weight(
        kernel=shaped(nf4.pack(codes), 2),
        scales=shaped(scales, nf4.BLOCK),
        **more,
        roles=roles,
        path=path,
        matrix=matrix,
        stored_dtype=jnp.dtype(dtype or kernel.dtype),
    )
