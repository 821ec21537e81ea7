"""The interpreter behind `lift`: evaluates a jaxpr on plain and adapted values.

Equation by equation: one that touches no adapted value is bound unchanged; one that does is looked
up in the table of rules (`core/primitives.py`, `core/control.py`); what has no rule is
materialised: right, counted, and said once.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lora_jax.core import jaxprs
from lora_jax.core.errors import RequestError
from lora_jax.core.segments import bind_run
from lora_jax.core.splits import typed_as
from lora_jax.core.values import is_adapted, is_bound, materialise


class MaterialisedWarning(UserWarning):
    """An adapted parameter met a primitive without a low-rank rule: W + ΔW was formed there."""


@dataclasses.dataclass(frozen=True)
class Materialised:
    """One place where W + ΔW was formed, or a quantised array expanded: the parameter, the
    primitive, the user's source line."""

    path: str
    primitive: str
    source: str
    reason: str = ""
    is_stored: bool = False  # no adapter there: a quantised array was expanded

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        what = "dequantised as a whole" if self.is_stored else "W + ΔW is formed"
        return (
            f"{self.path!r} is materialised ({what}) for `{self.primitive}` at {self.source}{why}"
        )


_watching = threading.local()


@contextlib.contextmanager
def watch_materialised() -> Iterator[list[Materialised]]:
    """Collects, in order, every materialisation made while tracing inside the block.

    Nothing is collected from a jit cache hit: the trace happened before.
    """
    outer = getattr(_watching, "events", None)
    _watching.events = events = []
    try:
        yield events
    finally:
        _watching.events = outer
        if outer is not None:
            outer.extend(events)


class Interpreter:
    """What one evaluation carries along: strictness, how often each weight was used, and `whole`,
    the jaxpr as it was traced, its constants and its arguments."""

    def __init__(self, *, strict: bool, whole: tuple[Any, Any, Any] | None = None):
        self.strict = strict
        self._whole = whole
        self._uses: collections.Counter[str] = collections.Counter()
        self._functions: dict[Any, Any] = {}  # of runs of equations

    def count_use(self, path: str) -> int:
        """How often the weight was used before: so that dropout differs from use to use."""
        self._uses[path] += 1
        return self._uses[path] - 1

    def materialise(self, value, primitive: str, source: str, reason: str = "") -> jax.Array:
        """The plain array of an adapted value, recorded; plain values pass."""
        if not is_adapted(value):
            return value
        if value.is_random:
            reason += ("; " if reason else "") + "its adapter dropout does nothing there"
        event = Materialised(value.path, primitive, source, reason, not is_bound(value))
        if self.strict:
            raise RequestError(
                f"{event}; there is no low-rank rule for it: lift without strict=True to accept "
                "that, or leave this parameter out of the rules"
            )
        if getattr(_watching, "events", None) is not None:
            _watching.events.append(event)
        warnings.warn(str(event), MaterialisedWarning, stacklevel=2)
        return materialise(value)

    def closed_over(self, consts, eqn, operands) -> list[Any]:
        """The values of what a derivative rule closes over.

        An array that the model computed is by now a tracer of a trace that is over. Where the
        rule's function uses it too, JAX made it an operand of the equation; otherwise it is
        computed again from the function's arguments, and XLA merges the two computations.
        """
        atoms = [jaxprs.variable_of(const) for const in consts]
        pairs = zip(eqn.invars, operands, strict=True)
        known = {atom: value for atom, value in pairs if not jaxprs.is_literal(atom)}
        lost = dict.fromkeys(atom for atom in atoms if atom is not None and atom not in known)
        if lost and self._whole is not None:
            whole = self._whole[0]
            own = {*whole.constvars, *whole.invars, *(v for e in whole.eqns for v in e.outvars)}
            if mine := [atom for atom in lost if atom in own]:
                known |= zip(mine, self._computed_again(mine, eqn), strict=True)
        return [known.get(atom, const) for atom, const in zip(atoms, consts, strict=True)]

    def _computed_again(self, variables, eqn) -> list[Any]:
        assert self._whole is not None
        jaxpr, constants, args = self._whole
        cause = "adapter dropout would draw another mask for it"
        try:
            if not any(is_adapted(arg) and arg.is_random for arg in args):
                outs = self.evaluate(jaxprs.slice_for(jaxpr, variables), constants, args)
                return self.plain(outs, eqn, "a derivative rule closes over it")
        except jax.errors.UnexpectedTracerError:
            cause = "it depends on what is differentiated"
        raise RequestError(
            f"the derivative rule of `{eqn.primitive.name}` at {jaxprs.source_line(eqn)} uses an "
            f"array that the model computes and that its function does not use, and {cause}; make "
            "that array an argument of the function"
        ) from None

    def plain(self, values, eqn, reason: str = "") -> list[Any]:
        if not any(map(is_adapted, values)):  # the source's line takes a while to find
            return list(values)
        name, source = eqn.primitive.name, jaxprs.source_line(eqn)
        return [self.materialise(value, name, source, reason) for value in values]

    def evaluate(self, jaxpr, consts, args) -> list[Any]:
        """The outputs of a jaxpr on plain and adapted values; outputs may be adapted."""
        bound = zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
        env: dict[Any, Any] = dict(bound)

        def read(atom):
            return atom.val if jaxprs.is_literal(atom) else env[atom]

        last_use = jaxprs.last_uses(jaxpr)
        run: list[Any] = []  # equations without adapted operands, not bound yet

        def bind_waiting(end: int):
            if run:
                is_live = lambda var: last_use.get(var, -1) >= end  # noqa: E731
                env.update(bind_run(self._functions, run, read, is_live))
                run.clear()

        for number, eqn in enumerate(jaxpr.eqns):
            adapted = any(
                not jaxprs.is_literal(atom) and is_adapted(env.get(atom)) for atom in eqn.invars
            )
            if not adapted and not eqn.effects:
                run.append(eqn)
                continue
            bind_waiting(number)
            values = [read(atom) for atom in eqn.invars]
            with jaxprs.equation_context(eqn):
                outs = self._apply_rule(eqn, values) if adapted else jaxprs.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        bind_waiting(len(jaxpr.eqns))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply_rule(self, eqn, values) -> list[Any]:
        rule = RULES.get(eqn.primitive.name, lambda *_: None)
        reason = ""
        try:
            outs = rule(self, eqn, values)
        except jaxprs.ShardingTypeError:
            outs, reason = None, "its factors cannot follow the explicit sharding"
        if outs is None:
            outs = jaxprs.bind(eqn, self.plain(values, eqn, reason))
        outs = outs if isinstance(outs, list | tuple) else [outs]
        return [typed_as(out, var.aval) for out, var in zip(outs, eqn.outvars, strict=True)]


# Primitive name -> rule(interpreter, equation, values) -> the result, a list of them, or None for
# "no low-rank form here". Filled by core/primitives.py and core/control.py at import.
RULES: dict[str, Callable[[Interpreter, Any, list[Any]], Any]] = {}


def rule_for(*names: str):
    """Registers a rule for the primitives of these names."""

    def register(rule):
        for name in names:
            RULES[name] = rule
        return rule

    return register
