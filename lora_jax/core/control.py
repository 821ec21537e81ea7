"""Rules for primitives that hold a jaxpr: each is bound again around the same interpreter.

Adapted values cross the boundary as the pytrees they are, so JAX's own transformations carry their
leaves. A loop's carry must keep its type, so an adapted value there is materialised first.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax

from lora_jax.core import jaxprs
from lora_jax.core.errors import RequestError
from lora_jax.core.interpreter import rule_for
from lora_jax.core.joins import as_arrays
from lora_jax.core.splits import sides_split, specs_of
from lora_jax.core.trees import Static, filled
from lora_jax.core.values import is_adapted, materialise

# Inner jits of a few equations (jnp.take, jax.nn.silu) are cheaper to inline than to trace again.
INLINE_EQUATIONS = 24
_NUMBERS = bool | int | float | complex | np.generic


def _body(interpreter, eqn, jaxpr, *, plain_outputs: bool):
    """The sub-jaxpr as a function of plain and adapted values."""
    jaxpr, consts = jaxprs.opened(jaxpr)

    def body(*values):
        outs = interpreter.evaluate(jaxpr, consts, values)
        return interpreter.plain(outs, eqn, "leaves the body") if plain_outputs else outs

    return body


@rule_for(*jaxprs.JIT)
def _jit(interpreter, eqn, values):
    params = eqn.params
    body = _body(interpreter, eqn, params["jaxpr"], plain_outputs=False)
    shardings = [*params["in_shardings"], *params["out_shardings"]]
    placed = any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)
    if not placed and len(jaxprs.opened(params["jaxpr"])[0].eqns) <= INLINE_EQUATIONS:
        return body(*values)
    if placed:
        body = _placed(body, params["in_shardings"], params["out_shardings"])
    body.__name__ = body.__qualname__ = params["name"]
    options = dict(params.get("compiler_options_kvs") or ()) or None
    return jax.jit(body, compiler_options=options)(*values)


def _placed(body, in_shardings, out_shardings):
    """An inner jit's shardings, as constraints on its plain operands, kernels and results."""

    def place(value, sharding):
        if not isinstance(sharding, jax.sharding.Sharding):
            return value
        if is_adapted(value):
            return value.on_base(lambda k: lax.with_sharding_constraint(k, sharding))
        return lax.with_sharding_constraint(value, sharding)

    def placed(*values):
        values = [place(v, s) for v, s in zip(values, in_shardings, strict=True)]
        return [place(v, s) for v, s in zip(body(*values), out_shardings, strict=True)]

    return placed


@rule_for("closed_call", "core_call", "eval_jaxpr")
def _call(interpreter, eqn, values):
    jaxpr = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    return None if jaxpr is None else _body(interpreter, eqn, jaxpr, plain_outputs=False)(*values)


@rule_for(*jaxprs.REMAT)
def _remat(interpreter, eqn, values):
    body = _body(interpreter, eqn, eqn.params["jaxpr"], plain_outputs=False)
    again = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return again(*values)


@rule_for("scan")
def _scan(interpreter, eqn, values):
    num_consts, num_carry = jaxprs.scan_counts(eqn)
    consts, rest = values[:num_consts], values[num_consts:]
    carry = interpreter.plain(rest[:num_carry], eqn, "a loop's carry must stay one array")
    stacked = [_along_first_axis(interpreter, eqn, x) for x in rest[num_carry:]]
    body = _body(interpreter, eqn, eqn.params["jaxpr"], plain_outputs=True)

    def step(carry, xs):
        outs = body(*consts, *carry, *xs)
        return outs[:num_carry], outs[num_carry:]

    names = ("length", "reverse", "unroll", "_split_transpose")
    options = {name: eqn.params[name] for name in names if name in eqn.params}
    carry, ys = lax.scan(step, carry, stacked, **options)
    return [*carry, *ys]


def _along_first_axis(interpreter, eqn, value):
    """A stacked kernel; of one scanned along its inputs or outputs each step has its chunk."""
    if not is_adapted(value) or value.scan_axis_is_stack():
        return value
    reason = "scanned along an axis that is not a stack axis"
    value = as_arrays(interpreter, eqn, value, reason)
    return value.along_first_axis() if is_adapted(value) else value


@rule_for("while")
def _while(interpreter, eqn, values):
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = values[:num_cond], values[num_cond : num_cond + num_body]
    carry = values[num_cond + num_body :]
    carry = interpreter.plain(carry, eqn, "a loop's carry must stay one array")
    cond = _body(interpreter, eqn, params["cond_jaxpr"], plain_outputs=True)
    body = _body(interpreter, eqn, params["body_jaxpr"], plain_outputs=True)
    return lax.while_loop(
        lambda carry: cond(*cond_consts, *carry)[0],
        lambda carry: body(*body_consts, *carry),
        carry,
    )


@rule_for("cond")
def _cond(interpreter, eqn, values):
    index, *operands = values
    branches = [
        _body(interpreter, eqn, branch, plain_outputs=True) for branch in eqn.params["branches"]
    ]
    return lax.switch(index, branches, *operands)


@rule_for("shard_map")
def _shard_map(interpreter, eqn, values):
    """Each shard sees its part of the kernel, and of the factors the parts that belong to it."""
    body = _body(interpreter, eqn, eqn.params["jaxpr"], plain_outputs=True)
    reason = "a shard sees a part of the array itself"
    values = [as_arrays(interpreter, eqn, value, reason) for value in values]
    in_specs = tuple(eqn.params["in_specs"])
    values = [sides_split(v, spec) for v, spec in zip(values, in_specs, strict=True)]
    specs = tuple(map(specs_of, values, in_specs))
    return jaxprs.shard_map(eqn, lambda *parts: tuple(body(*parts)), specs)(*values)


@rule_for("custom_jvp_call")
def _custom_jvp(interpreter, eqn, values):
    """The user's rule is kept. Its tangent for a kernel is the dense tangent of W + ΔW, since that
    is what the rule was written for; the primal outputs stay low-rank in both directions."""
    _check_not_random(eqn, values)
    primal = jax.custom_jvp(_body(interpreter, eqn, eqn.params["call_jaxpr"], plain_outputs=True))
    rule = jaxprs.custom_jvp_rule(eqn)

    def jvp(values, tangents):
        tangents = [_tangent_of(v, t) for v, t in zip(values, tangents, strict=True)]
        if not eqn.params["symbolic_zeros"]:
            tangents = [jaxprs.instantiated(t) for t in tangents]
        outs = _evaluate_rule(interpreter, eqn, rule, values, values, tangents)
        return outs[: len(outs) // 2], outs[len(outs) // 2 :]

    primal.defjvp(jvp, symbolic_zeros=True)
    return primal(*values)


@rule_for("custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom_vjp(interpreter, eqn, values):
    """The user's rules are kept, both evaluated by this interpreter. What the backward rule gives
    for a kernel is dense, as the user wrote it, and is then projected onto the factors."""
    if "call_jaxpr" not in eqn.params:
        return None
    _check_not_random(eqn, values)
    primal = jax.custom_vjp(_body(interpreter, eqn, eqn.params["call_jaxpr"], plain_outputs=True))
    forward_rule, backward_rule = jaxprs.custom_vjp_rules(eqn)

    def forward(*values):
        # JAX's own flags, so that constants and integers are not taken for differentiated.
        perturbed = [any(leaf.perturbed for leaf in jax.tree.leaves(v)) for v in values]
        values = [jax.tree.map(lambda leaf: leaf.value, v) for v in values]

        def flat(*args):
            residuals, outs = forward_rule(perturbed, *args)
            # A Python number, such as one of the flags, stays one: the backward rule may branch.
            fixed = [Static(r) if isinstance(r, _NUMBERS) else r for r in residuals]
            return fixed, outs

        found, tree = _run_rule(interpreter, eqn, flat, values, values)
        residuals, outs = jax.tree_util.tree_unflatten(tree, found)
        return interpreter.plain(outs, eqn, "leaves the body"), (residuals, values)

    def backward(saved, cotangents):
        residuals, values = saved
        if not eqn.params["symbolic_zeros"]:
            cotangents = [jaxprs.instantiated(ct) for ct in cotangents]
        dense = _evaluate_rule(interpreter, eqn, backward_rule, values, residuals, cotangents)
        dense = [None if jaxprs.is_symbolic_zero(x) else x for x in dense]
        return tuple(
            jax.vjp(materialise, value)[1](cotangent)[0]
            if is_adapted(value) and cotangent is not None
            else cotangent
            for value, cotangent in zip(values, dense, strict=True)
        )

    primal.defvjp(forward, backward, symbolic_zeros=True)
    return primal(*values)


def _check_not_random(eqn, values) -> None:
    if random := [value for value in values if is_adapted(value) and value.is_random]:
        raise RequestError(
            f"{random[0].path!r} has adapter dropout and meets `{eqn.primitive.name}` at "
            f"{jaxprs.source_line(eqn)}: the gradient written there is that of one fixed weight, "
            "so it would not be that of a dropped one; set dropout=0 for this parameter"
        )


def _run_rule(interpreter, eqn, rule, operands, inputs):
    """`(results, their tree)` of a derivative rule, by this interpreter."""
    shapes = [value.base if is_adapted(value) else value for value in inputs]
    jaxpr, consts, tree, _ = jaxprs.trace(rule, *shapes)
    consts = interpreter.closed_over(consts, eqn, operands)
    return interpreter.evaluate(jaxpr, consts, inputs), tree


def _evaluate_rule(interpreter, eqn, rule, operands, values, linear) -> list:
    """The plain results of a derivative rule on `values` and tangents or cotangents.

    Symbolic zeros, and those of integers, have no array to trace: they pass around the jaxpr.
    """
    given = [*values, *linear]
    every = [x.value if isinstance(x, Static) else x for x in given]
    has_array = [not isinstance(x, Static) and not jaxprs.is_symbolic_zero(x) for x in given]
    traced = [n for n, is_traced in enumerate(has_array) if is_traced]
    places: list = []

    def flat(*args):
        outs = list(rule(*filled(every, traced, args)))
        places[:] = [out if jaxprs.is_symbolic_zero(out) else None for out in outs]
        return [out for out in outs if not jaxprs.is_symbolic_zero(out)]

    inputs = [every[n] for n in traced]
    outs, _ = _run_rule(interpreter, eqn, flat, operands, inputs)
    outs = iter(interpreter.plain(outs, eqn, "leaves the body"))
    return [next(outs) if zero is None else zero for zero in places]


def _tangent_of(value, tangent):
    """The tangent of the plain array that a value stands for; symbolic where all its leaves are."""
    if not is_adapted(value):
        return tangent
    leaves = jax.tree.leaves(tangent)
    if all(jaxprs.is_symbolic_zero(leaf) for leaf in leaves):
        return jaxprs.symbolic_zero(value.base)
    return jax.jvp(materialise, (value,), (jax.tree.map(jaxprs.instantiated, tangent),))[1]
