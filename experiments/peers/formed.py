"""Whether a function forms ΔW, read off its jaxpr: which values depend on A and B but not on x.

In a low-rank evaluation A meets B only through activations: `(x A) B`. A value that depends on both
factors of a kernel and not on the input is ΔW, W + ΔW, or a part of one: a layer, a shard, a slice.
Loops, branches and calls are followed inside; what cannot be followed counts as formed.
"""

from __future__ import annotations

import math

import jax

CALLS_OF_REFS = ("pallas_call",)  # its body reads and writes references; its operands are seen here


def formed_updates(run, factors, x) -> list[str]:
    """What forms an update in `run(factors, x)`, as "primitive shape"; empty if nothing does.

    `factors` is `{kernel: {"a": array, "b": array}}`.
    """
    closed = jax.make_jaxpr(run)(factors, x)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path((factors, x))[0]]
    given = [frozenset([_label(path)]) for path in paths]
    # Below this many elements lies what is no part of ΔW, such as (r, r) products of the factors.
    floors = {
        kernel: min(math.prod(factor.shape) for factor in pair.values())
        for kernel, pair in factors.items()
    }
    found: list[str] = []
    _follow(getattr(closed, "jaxpr", closed), given, floors, found)
    return sorted(set(found))


def _label(path):
    if path[0].idx == 1:
        return "x"
    return (path[1].key, path[2].key)


def _follow(jaxpr, given, floors, found) -> list[frozenset]:
    """What each result depends on; appends to `found` what forms an update on the way."""
    depends = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom):
        return frozenset() if hasattr(atom, "val") else depends.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        results = _equation(eqn, [of(atom) for atom in eqn.invars], floors, found)
        for variable, labels in zip(eqn.outvars, results, strict=True):
            depends[variable] = labels
            if _is_update(variable.aval, labels, floors):
                found.append(f"{eqn.primitive.name} {tuple(variable.aval.shape)}")
    return [of(atom) for atom in jaxpr.outvars]


def _is_update(aval, labels, floors) -> bool:
    shape = getattr(aval, "shape", ())
    if "x" in labels or sum(n > 1 for n in shape) < 2:
        return False
    return any(
        {(kernel, "a"), (kernel, "b")} <= labels and math.prod(shape) >= floor
        for kernel, floor in floors.items()
    )


def _equation(eqn, given, floors, found) -> list[frozenset]:
    name = eqn.primitive.name
    everything = frozenset().union(*given)
    bodies = _bodies(eqn)
    if not bodies or name in CALLS_OF_REFS:
        return [everything] * len(eqn.outvars)
    if name == "scan":
        num_consts, num_carry = _scan_counts(eqn)
        return _loop(bodies[0], given, num_consts, num_carry, floors, found)
    if name == "while":
        consts = eqn.params["cond_nconsts"]
        body = _opened(eqn.params["body_jaxpr"])
        mine, nconsts = given[consts:], eqn.params["body_nconsts"]
        return _loop(body, mine, nconsts, len(mine) - nconsts, floors, found)
    if name == "cond":
        results = [_follow(body, given[1:], floors, found) for body in bodies]
        return [frozenset().union(*branch) for branch in zip(*results, strict=True)]
    fitting = [body for body in bodies if len(body.invars) == len(given)]
    results = [_follow(body, given, floors, found) for body in fitting]
    if not results or len(results[0]) != len(eqn.outvars):
        found.append(f"{name}: not followed")
        return [everything] * len(eqn.outvars)
    return results[0]


def _loop(body, given, num_consts, num_carry, floors, found) -> list[frozenset]:
    """A loop's carry depends on all that any step put into it: repeated until nothing is added."""
    given = list(given)
    while True:
        steps: list[str] = []
        results = _follow(body, given, floors, steps)
        carried = slice(num_consts, num_consts + num_carry)
        grown = [old | new for old, new in zip(given[carried], results[:num_carry], strict=True)]
        if grown == given[carried]:
            found.extend(steps)
            return results
        given[carried] = grown


def _scan_counts(eqn) -> tuple[int, int]:
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # from JAX 0.11
    return len(consts), len(carry)


def _opened(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _bodies(eqn) -> list:
    """Every jaxpr among an equation's parameters, opened."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            body = _opened(item)
            if hasattr(body, "eqns"):
                found.append(body)
    return found
