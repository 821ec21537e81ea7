"""Rules for single primitives: how an adapted value passes through each without being formed.

A rule returns the results, or None where this use has no low-rank form. See `lora_jax/README.md`
for the table of what is low-rank and what is materialised.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jaxprs
from lora_jax.core.grouped import GroupedWeight
from lora_jax.core.joins import as_arrays, joined
from lora_jax.core.lift import rule_for
from lora_jax.core.lookups import GatherUse
from lora_jax.core.splits import resharded
from lora_jax.core.uses import ConvUse, DotUse, RaggedUse
from lora_jax.core.values import is_adapted, placed


def _one(value):
    return None if value is None else [value]


@rule_for("dot_general")
def _dot_general(interpreter, eqn, values):
    lhs, rhs = values
    if is_adapted(lhs) and is_adapted(rhs):
        # A product of two adapted weights: the smaller is formed, the larger stays low-rank.
        small = 0 if lhs.size <= rhs.size else 1
        (values[small],) = interpreter.plain([values[small]], eqn, "both operands are adapted")
    return _used(DotUse, interpreter, eqn, values, 0 if is_adapted(values[0]) else 1)


@rule_for("conv_general_dilated")
def _conv(interpreter, eqn, values):
    return _used(ConvUse, interpreter, eqn, values, 1)


@rule_for("ragged_dot_general")
def _ragged_dot(interpreter, eqn, values):
    return _used(RaggedUse, interpreter, eqn, values, 1)


@rule_for("gather")
def _gather(interpreter, eqn, values):
    return _used(GatherUse, interpreter, eqn, values, 0)


def _used(kind, interpreter, eqn, values, place: int):
    weight, others = values[place], (*values[:place], *values[place + 1 :])
    if not is_adapted(weight) or any(map(is_adapted, others)):
        return None
    use = kind(eqn, others, place, tuple(weight.shape))
    if not use.has_form():
        return None
    if kind is not GatherUse:  # which has no input that dropout could reach
        use = dataclasses.replace(use, uses=interpreter.count_use(weight.path))
    return _one(weight.use(use))


@rule_for("mul", "div")
def _times(interpreter, eqn, values):
    """A kernel times a number; times an array it has no low-rank form."""
    left, right = values
    if eqn.primitive.name == "div":
        weight, number = left, right
    else:
        weight, number = (left, right) if is_adapted(left) else (right, left)
    if not is_adapted(weight) or is_adapted(number) or number.ndim:
        return None
    if eqn.primitive.name == "div":
        factor = lax.div(lax.full_like(number, 1), number)
        return _one(weight.times(factor, lambda kernel: jaxprs.bind(eqn, [kernel, number])[0]))
    return _one(weight.times(number, lambda kernel: lax.mul(kernel, number)))


@rule_for("add", "sub")
def _moved(interpreter, eqn, values):
    """A kernel plus or minus a plain array moves the frozen kernel; the factors stay."""
    left, right = values
    if is_adapted(left) and is_adapted(right):
        factors = [1, -1 if eqn.primitive.name == "sub" else 1]
        return joined(interpreter, eqn, values, lambda x: jaxprs.bind(eqn, x)[0], factors)
    weight, other = (left, right) if is_adapted(left) else (right, left)
    if is_adapted(other) or tuple(weight.shape) != eqn.outvars[0].aval.shape:
        return None
    moved = as_arrays(interpreter, eqn, weight, "moved by an array")
    sign = -1 if eqn.primitive.name == "sub" and weight is right else 1

    def bind(kernel):
        return jaxprs.bind(eqn, [kernel, other] if weight is left else [other, kernel])[0]

    return _one(moved.moved(sign, bind)) if is_adapted(moved) else [bind(moved)]


@rule_for("pad")
def _pad(interpreter, eqn, values):
    weight, value = values
    if not is_adapted(weight) or is_adapted(value):
        return None
    weight = as_arrays(interpreter, eqn, weight, "padded")
    if not is_adapted(weight):
        return jaxprs.bind(eqn, [weight, value])
    return _one(weight.pad(value, eqn.params["padding_config"]))


@rule_for("neg")
def _neg(interpreter, eqn, values):
    (weight,) = values
    return _one(weight.times(jnp.full((), -1, weight.dtype), lax.neg))


@rule_for("rev")
def _rev(interpreter, eqn, values):
    return _one(values[0].reverse(eqn.params["dimensions"]))


@rule_for("convert_element_type")
def _convert(interpreter, eqn, values):
    return _one(values[0].convert(eqn.params["new_dtype"]))


@rule_for("transpose")
def _transpose(interpreter, eqn, values):
    return _one(values[0].transpose(eqn.params["permutation"]))


@rule_for("reshape")
def _reshape(interpreter, eqn, values):
    weight, order = values[0], eqn.params["dimensions"]
    if order is not None:  # vmap of a convolution permutes the axes within its reshape
        weight = weight.transpose(order)
    if weight is None:
        return None
    shape = tuple(eqn.params["new_sizes"])
    return _one(weight.reshape(shape) or GroupedWeight.of(weight, shape))


@rule_for("squeeze")
def _squeeze(interpreter, eqn, values):
    dropped = {axis % values[0].ndim for axis in eqn.params["dimensions"]}
    kept = [n for axis, n in enumerate(values[0].shape) if axis not in dropped]
    return _one(values[0].reshape(tuple(kept)))


@rule_for("broadcast_in_dim")
def _broadcast(interpreter, eqn, values):
    # Adding axes of size one is a reshape; a true broadcast has no rule.
    if is_adapted(values[0]) and eqn.outvars[0].aval.size == values[0].size:
        return _one(values[0].reshape(tuple(eqn.params["shape"])))
    return None


@rule_for("slice")
def _slice(interpreter, eqn, values):
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    sizes = [-(-(e - s) // k) for s, e, k in zip(starts, limits, strides, strict=True)]
    return _one(values[0].slice_axes([int(s) for s in starts], sizes, strides))


@rule_for("dynamic_slice")
def _dynamic_slice(interpreter, eqn, values):
    weight, *starts = values
    if not is_adapted(weight) or any(is_adapted(start) for start in starts):
        return None
    return _one(weight.slice_axes(starts, eqn.params["slice_sizes"], None))


@rule_for("split")
def _split(interpreter, eqn, values):
    (weight,), axis = values, eqn.params["axis"]
    start, pieces = 0, []
    for size in eqn.params["sizes"]:
        starts, sizes = [0] * weight.ndim, list(weight.shape)
        starts[axis], sizes[axis] = start, int(size)
        pieces.append(weight.slice_axes(starts, sizes, [1] * weight.ndim))
        start += int(size)
    return None if any(piece is None for piece in pieces) else pieces


@rule_for("sharding_constraint", "copy", "copy_p", "name", "layout_constraint", "pvary")
def _on_kernel(interpreter, eqn, values):
    """Marks and placements concern the kernel; the factors follow their own sharding."""
    (weight,) = values
    return _one(weight.marked(lambda kernel: jaxprs.bind(eqn, [kernel])[0]))


@rule_for("device_put")
def _device_put(interpreter, eqn, values):
    """The factors go with their kernel, unless its sharding names its own axes."""
    if len(values) > 1 or isinstance(values[0], GroupedWeight):
        return None
    (target,) = eqn.params["devices"]
    named = isinstance(target, jax.sharding.Sharding) and len(target.device_set) > 1

    def put(x):
        return jaxprs.bind(eqn, [x])[0]

    return _one(placed(values[0], put, (lambda x: x) if named else put))


@rule_for("reshard")
def _reshard(interpreter, eqn, values):
    """Explicit sharding: the factors are split as their kernel is, in the type too."""
    put = functools.partial(jaxprs.reshard, eqn)
    return [resharded(values[0], eqn.params["dst_sharding"], put)]


@rule_for("optimization_barrier")
def _barrier(interpreter, eqn, values):
    # What is stored in another form has no array yet that a barrier could hold.
    plain = [value.base if is_adapted(value) else value for value in values]
    held = [n for n, value in enumerate(plain) if not isinstance(value, jax.ShapeDtypeStruct)]
    outs = dict(zip(held, lax.optimization_barrier([plain[n] for n in held]), strict=True))
    return [
        value
        if n not in outs
        else value.on_base(lambda _, out=outs[n]: out)
        if is_adapted(value)
        else outs[n]
        for n, value in enumerate(values)
    ]
