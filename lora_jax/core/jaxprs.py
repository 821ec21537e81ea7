"""All that differs between JAX versions, and nothing else: reading jaxprs and binding equations.

Supported: JAX 0.10 to 0.12. What moved in between: scan's `num_consts` and `num_carry` became the
groups of `ft_in` (0.11), and `ClosedJaxpr` merged into `Jaxpr` (0.12).
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import source_info_util
from jax._src.core import ShardingTypeError as ShardingTypeError  # explicit sharding
from jax._src.interpreters import partial_eval
from jax.core import ShapedArray, Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal
from jax.interpreters import ad

from lora_jax.core.errors import RequestError

JIT = frozenset({"jit", "pjit"})
_within = threading.local()  # .equations: those being evaluated, outermost first
_NOTE = "in the lifted model,"
REMAT = frozenset({"remat2", "remat", "checkpoint"})


def trace(fun, *args):
    """Traces `fun` over the shapes of `args`: `(jaxpr, consts, out_tree, whole)`; computes nothing.

    What no result needs is removed, in sub-jaxprs too; equations with effects stay. `whole` is the
    jaxpr before that.
    """
    try:
        closed, out_shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # Flax's; this layer knows no Flax
            raise
        what = str(error).split(" (")[0]
        raise RequestError(
            f"the model changes an NNX variable that it closes over ({what}); pass "
            "the state of Dropout and BatchNorm as an argument, apply(params, rest, x), and merge "
            "the module inside"
        ) from error
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, True, instantiate=True)
    return jaxpr, closed.consts, jax.tree_util.tree_structure(out_shape), closed.jaxpr


class Slice(NamedTuple):
    """The equations of a jaxpr that some of its variables need; read as a jaxpr is."""

    constvars: Any
    invars: Any
    eqns: list[Any]
    outvars: list[Any]


def slice_for(jaxpr, variables) -> Slice:
    """The part of `jaxpr` that computes `variables`, in the order of its equations."""
    needed, eqns = set(variables), []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    return Slice(jaxpr.constvars, jaxpr.invars, eqns[::-1], list(variables))


def opened(jaxpr):
    """`(jaxpr, consts)` of an equation's sub-jaxpr, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def scan_counts(eqn) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, and how many the carry."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def ragged_contraction(eqn) -> int | None:
    """The kernel's contracted axis of a ragged product of rows (m, k) with a kernel (g, k, n) or
    (g, n, k), the rows split into groups; None for any other."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (mine, theirs), batch = numbers.dot_dimension_numbers
    found = (mine, *batch, numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions)
    has_form = [*map(tuple, found)] == [(1,), (), (), (0,), (0,)] and tuple(theirs) in ((1,), (2,))
    return theirs[0] if has_form and eqn.params.get("group_offset") is None else None


def shard_map(eqn, body, in_specs):
    """The equation's shard_map around another body of the same results."""
    params = eqn.params
    # JAX 0.10.0 calls them manual_axes.
    axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=tuple(params["out_specs"]),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )


def sub_jaxprs(eqn) -> list[Any]:
    """Every jaxpr among an equation's parameters, closed or not."""
    values = (v if isinstance(v, tuple | list) else (v,) for v in eqn.params.values())
    return [x for items in values for x in items if hasattr(opened(x)[0], "eqns")]


def last_uses(jaxpr) -> dict[Any, int]:
    """`{variable: number of the last equation that reads it}`; results count as read at the end."""
    reads = [*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]
    return {atom: n for n, atoms in enumerate(reads) for atom in atoms if not is_literal(atom)}


def is_literal(atom) -> bool:
    return isinstance(atom, Literal)


def source_of(eqn, **options):
    """The traced equation's source line, for what is bound inside."""
    return source_info_util.user_context(eqn.source_info.traceback, **options)


@contextlib.contextmanager
def equation_context(eqn):
    """Name stack, source line and settings of the traced equation, for what is bound inside.

    What raises there, such as the check of `jax_debug_nans`, names the model's own line.
    """
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    outer = getattr(_within, "equations", ())
    _within.equations = (*outer, eqn)
    try:
        with source_of(eqn, name_stack=stack), eqn.ctx.manager:
            yield
    except Exception as error:
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_NOTE} `{eqn.primitive.name}` at {source_line(eqn)}")
        raise
    finally:
        _within.equations = outer


def bind(eqn, values) -> list[Any]:
    """The equation unchanged, on plain arrays; always a list of results."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def source_line(eqn) -> str:
    """The user's file, line and function that made the equation.

    Inside JAX's own jitted functions (`jnp.sort`) an equation has no line of the user's: then it is
    that of the nearest equation around it that has one.
    """
    around = reversed(getattr(_within, "equations", ()))
    lines = (source_info_util.summarize(e.source_info) for e in (eqn, *around))
    return next(filter(None, lines), "an unknown line")


def custom_jvp_rule(eqn):
    """The flat rule `(*primals, *tangents) -> (*primals_out, *tangents_out)` of a custom_jvp."""
    _, rule = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    return rule.call_wrapped


def custom_vjp_rules(eqn):
    """The flat rules of a custom_vjp: `forward(perturbed, *args) -> (residuals, outs)`, `backward`.

    `backward(*residuals, *cotangents)` returns one cotangent per argument.
    """
    _, forward, backward = eqn.primitive.get_bind_params(eqn.params)["subfuns"]

    def flat_forward(perturbed, *args):
        # Each argument comes with a flag: is it differentiated?
        pairs = zip(args, perturbed, strict=True)
        out = forward.call_wrapped(*(item for pair in pairs for item in pair))
        _, residual_tree, forwarded = eqn.params["out_trees"]()
        # A residual that is an argument unchanged is not returned, but named by its position.
        num_returned = residual_tree.num_leaves - sum(f is not None for f in forwarded)
        returned = iter(out[:num_returned])
        residuals = [next(returned) if f is None else args[f] for f in forwarded]
        return residuals, list(out[num_returned:])

    def flat_backward(*args):
        out = backward.call_wrapped(*args)
        # JAX 0.12 returns what the rule logs as a second result.
        return out[0] if isinstance(out, tuple) else out

    return flat_forward, flat_backward


def variable_of(const):
    """The variable of the trace that made a tracer; None for another value."""
    atom = getattr(const, "val", None) if isinstance(const, Tracer) else None
    return None if atom is None or is_literal(atom) else atom


def is_symbolic_zero(x) -> bool:
    """Whether a tangent or cotangent is zero without an array, or one of an integer or a key."""
    return isinstance(x, SymbolicZero | ad.Zero) or getattr(x, "dtype", None) == jax.dtypes.float0


def symbolic_zero(x):
    """The symbolic zero tangent of an array of this shape and dtype."""
    return SymbolicZero(ShapedArray(x.shape, x.dtype).to_tangent_aval())


def instantiated(x):
    """A tangent as an array; those of integers and keys are NumPy's `float0`."""
    if not isinstance(x, SymbolicZero):
        return x
    aval: Any = x.aval
    if aval.dtype == jax.dtypes.float0:
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jax.numpy.zeros(aval.shape, aval.dtype)
