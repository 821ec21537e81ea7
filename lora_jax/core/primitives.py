"""Rules for single primitives: how an adapted value passes through each without being formed.

A rule returns the results, or None where this use has no low-rank form. See `lora_jax/README.md`
for the table of what is low-rank and what is materialised.
"""

from __future__ import annotations

from lora_jax.core import jaxprs
from lora_jax.core.lift import rule_for
from lora_jax.core.weights import is_adapted


def _one(value):
    return None if value is None else [value]


@rule_for("dot_general")
def _dot_general(interpreter, eqn, values):
    lhs, rhs = values
    if is_adapted(lhs) and is_adapted(rhs):
        # A product of two adapted weights: the smaller is formed, the larger stays low-rank.
        small = 0 if lhs.kernel.size <= rhs.kernel.size else 1
        (values[small],) = interpreter.plain([values[small]], eqn, "both operands are adapted")
        lhs, rhs = values
    side = "lhs" if is_adapted(lhs) else "rhs"
    weight, other = (lhs, rhs) if side == "lhs" else (rhs, lhs)
    return _one(
        weight.dot(
            other,
            eqn.params["dimension_numbers"],
            kernel_side=side,
            bind=lambda left, right: jaxprs.bind(eqn, [left, right])[0],
            uses=interpreter.count_use(weight.path),
            precision=eqn.params["precision"],
        )
    )


@rule_for("convert_element_type")
def _convert(interpreter, eqn, values):
    return _one(values[0].convert(eqn.params["new_dtype"]))


@rule_for("transpose")
def _transpose(interpreter, eqn, values):
    return _one(values[0].transpose(eqn.params["permutation"]))


@rule_for("reshape")
def _reshape(interpreter, eqn, values):
    if eqn.params["dimensions"] is not None:
        return None
    return _one(values[0].reshape(tuple(eqn.params["new_sizes"])))


@rule_for("squeeze")
def _squeeze(interpreter, eqn, values):
    dropped = {axis % values[0].kernel.ndim for axis in eqn.params["dimensions"]}
    kept = [n for axis, n in enumerate(values[0].kernel.shape) if axis not in dropped]
    return _one(values[0].reshape(tuple(kept)))


@rule_for("expand_dims")
def _expand_dims(interpreter, eqn, values):
    return _one(values[0].reshape(tuple(eqn.outvars[0].aval.shape)))


@rule_for("broadcast_in_dim")
def _broadcast(interpreter, eqn, values):
    # Adding axes of size one is a reshape; a true broadcast has no rule.
    if is_adapted(values[0]) and eqn.outvars[0].aval.size == values[0].kernel.size:
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
        starts, sizes = [0] * weight.kernel.ndim, list(weight.kernel.shape)
        starts[axis], sizes[axis] = start, int(size)
        pieces.append(weight.slice_axes(starts, sizes, [1] * weight.kernel.ndim))
        start += int(size)
    return None if any(piece is None for piece in pieces) else pieces


@rule_for("sharding_constraint", "copy", "copy_p", "name", "layout_constraint", "pvary")
def _on_kernel(interpreter, eqn, values):
    """Marks and placements concern the kernel; the factors follow their own sharding."""
    (weight,) = values
    return _one(weight.with_kernel(jaxprs.bind(eqn, [weight.kernel])[0]))


@rule_for("optimization_barrier")
def _barrier(interpreter, eqn, values):
    plain = [value.kernel if is_adapted(value) else value for value in values]
    outs = jaxprs.bind(eqn, plain)
    return [
        value.with_kernel(out) if is_adapted(value) else out
        for value, out in zip(values, outs, strict=True)
    ]
