"""Runs of equations that touch no adapted value, each bound as one inlined jit.

Evaluating a jaxpr under `grad` costs most in linearising primitive by primitive. A jit is
linearised once and remembered by its jaxpr, so each run between two adapted products becomes one,
and the runs of equal layers share it. `inline=True` leaves no trace of it in the program, but gives
all its operations the source line of the call: here, that of the run's first equation.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lora_jax.core import jaxprs


def bind_run(functions: dict[Any, Any], eqns, read, live) -> dict[Any, Any]:
    """`{variable: value}` of what the run defines and `live(variable)` says is used later.

    Equal runs share one jitted function of `functions`, to which new ones are added.
    """
    numbers: dict[Any, int] = {}
    inputs = []
    for eqn in eqns:
        for atom in eqn.invars:
            if not jaxprs.is_literal(atom) and atom not in numbers:
                numbers[atom] = len(numbers)
                inputs.append(atom)
        for var in eqn.outvars:
            numbers[var] = len(numbers)
    outputs = [var for eqn in eqns for var in eqn.outvars if live(var)]
    key = (tuple(_key(eqn, numbers) for eqn in eqns), tuple(numbers[v] for v in outputs))
    if key not in functions:
        functions[key] = _function(tuple(eqns), inputs, outputs)
    with jaxprs.source_of(eqns[0]):
        values = functions[key](*map(read, inputs))
    return dict(zip(outputs, values, strict=True))


def _function(eqns, inputs, outputs):
    def run(*values):
        env = dict(zip(inputs, values, strict=True))
        for eqn in eqns:
            operands = [a.val if jaxprs.is_literal(a) else env[a] for a in eqn.invars]
            with jaxprs.equation_context(eqn):
                env.update(zip(eqn.outvars, jaxprs.bind(eqn, operands), strict=True))
        return [env[var] for var in outputs]

    return jax.jit(run, inline=True)


def _key(eqn, numbers):
    """What makes two equations do the same under the same names; a fresh object if unhashable."""
    key = (
        eqn.primitive,
        tuple(sorted(eqn.params.items(), key=lambda item: item[0])),
        tuple(_literal(a) if jaxprs.is_literal(a) else numbers[a] for a in eqn.invars),
        tuple(numbers[var] for var in eqn.outvars),
        eqn.source_info.name_stack,
        eqn.ctx,
    )
    try:
        hash(key)
    except TypeError:
        return object()
    return key


def _literal(atom):
    value = np.asarray(atom.val)
    return (str(value.dtype), value.shape, value.tobytes(), str(atom.aval))
