"""Rules for single primitives: how an adapted value passes through each without being formed.

A rule returns the result, or a list of them, or None where this use has no low-rank form. See
`README.md` here for the table of what is low-rank and what is materialised.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jaxprs
from lora_jax.core.grouped import GroupedWeight
from lora_jax.core.interpreter import rule_for
from lora_jax.core.joins import as_arrays, joined
from lora_jax.core.lookups import GatherUse
from lora_jax.core.splits import placed, resharded
from lora_jax.core.uses import ConvUse, DotUse, RaggedUse
from lora_jax.core.values import is_adapted

USES = {
    "dot_general": DotUse,
    "conv_general_dilated": ConvUse,
    "ragged_dot_general": RaggedUse,
    "gather": GatherUse,
}


@rule_for(*USES)
def _used(interpreter, eqn, values):
    kind = USES[eqn.primitive.name]
    if kind is DotUse and all(map(is_adapted, values)):
        # A product of two adapted weights: the smaller is formed, the larger stays low-rank.
        small = 0 if values[0].size <= values[1].size else 1
        (values[small],) = interpreter.plain([values[small]], eqn, "both operands are adapted")
    place = next(n for n, value in enumerate(values) if is_adapted(value))
    weight, others = values[place], (*values[:place], *values[place + 1 :])
    use = kind(eqn, others, place, tuple(weight.shape))
    if any(map(is_adapted, others)) or not use.has_form():
        return None
    if kind is not GatherUse:  # which has no input that dropout could reach
        use = dataclasses.replace(use, uses=interpreter.count_use(weight.path))
    return weight.use(use)


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
        return weight.times(factor, lambda kernel: jaxprs.bind(eqn, [kernel, number])[0])
    return weight.times(number, lambda kernel: lax.mul(kernel, number))


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

    return moved.moved(sign, bind) if is_adapted(moved) else bind(moved)


@rule_for("pad")
def _pad(interpreter, eqn, values):
    weight, value = values
    if not is_adapted(weight) or is_adapted(value):
        return None
    weight = as_arrays(interpreter, eqn, weight, "padded")
    if not is_adapted(weight):
        return jaxprs.bind(eqn, [weight, value])
    return weight.pad(value, eqn.params["padding_config"])


def _reshaped(weight, params):
    order = params["dimensions"]
    if order is not None:  # vmap of a convolution permutes the axes within its reshape
        weight = weight.transpose(order)
    if weight is None:
        return None
    shape = tuple(params["new_sizes"])
    return weight.reshape(shape) or GroupedWeight.of(weight, shape)


def _squeezed(weight, params):
    dropped = {axis % weight.ndim for axis in params["dimensions"]}
    return weight.reshape(tuple(n for axis, n in enumerate(weight.shape) if axis not in dropped))


def _sliced(weight, params):
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    sizes = [-(-(e - s) // k) for s, e, k in zip(starts, limits, strides, strict=True)]
    return weight.slice_axes([int(s) for s in starts], sizes, strides)


def _broadcast(weight, params):
    # Adding axes of size one is a reshape; a true broadcast has no rule.
    shape = tuple(params["shape"])
    return weight.reshape(shape) if math.prod(shape) == weight.size else None


# What becomes of an adapted value that is the only operand.
FOLLOWED = {
    "neg": lambda weight, params: weight.times(jnp.full((), -1, weight.dtype), lax.neg),
    "rev": lambda weight, params: weight.reverse(params["dimensions"]),
    "convert_element_type": lambda weight, params: weight.convert(params["new_dtype"]),
    "transpose": lambda weight, params: weight.transpose(params["permutation"]),
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "slice": _sliced,
    "broadcast_in_dim": _broadcast,
}


@rule_for(*FOLLOWED)
def _followed(interpreter, eqn, values):
    weight = values[0]
    return FOLLOWED[eqn.primitive.name](weight, eqn.params) if is_adapted(weight) else None


@rule_for("dynamic_slice")
def _dynamic_slice(interpreter, eqn, values):
    weight, *starts = values
    if not is_adapted(weight) or any(is_adapted(start) for start in starts):
        return None
    return weight.slice_axes(starts, eqn.params["slice_sizes"], None)


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
    return weight.marked(lambda kernel: jaxprs.bind(eqn, [kernel])[0])


@rule_for("device_put")
def _device_put(interpreter, eqn, values):
    """The factors go with their kernel, unless its sharding names its own axes."""
    if len(values) > 1 or isinstance(values[0], GroupedWeight):
        return None
    (target,) = eqn.params["devices"]
    named = isinstance(target, jax.sharding.Sharding) and len(target.device_set) > 1

    def put(x):
        return jaxprs.bind(eqn, [x])[0]

    return placed(values[0], put, (lambda x: x) if named else put)


@rule_for("reshard")
def _reshard(interpreter, eqn, values):
    """Explicit sharding: the factors are split as their kernel is, in the type too."""

    def put(x, sharding):
        return eqn.primitive.bind(x, **{**eqn.params, "dst_sharding": sharding})

    return resharded(values[0], eqn.params["dst_sharding"], put)


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
