"""One cell of the table: a tool's way of adapting a construct, run with the oracle.

The oracle is W' = W + scale · A·B, computed here, then the plain model of `cases.py`; outputs and
the gradients of A and B are compared under `jit`, at random non-zero A and B.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.peers.cases import Case
from experiments.peers.formed import formed_updates

# Largest difference over the largest entry. bfloat16 keeps 8 bits, and is judged against float64.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 3e-2}
VERDICTS = ("low-rank", "materialised", "error", "silently wrong", "not expressible")  # best first


class NotExpressible(Exception):
    """The tool has no way to attach there; the text says why."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model adapted by a tool.

    `factors` is `{name: {"a", "b"}}`, every adapter the tool made, named by its kernel or as
    "kernel:part"; `run(factors, x)` is its model. `update(name, pair)` is scale · A·B in the
    kernel's shape, as the tool means its own factors, but computed by us. `note` goes to a
    footnote.
    """

    factors: Mapping[str, Mapping[str, Any]]
    run: Callable
    update: Callable
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of writing a cell: `build(params, x)` gives an `Adapted` or raises.

    `rewritten` where the model had to be written for the tool, the kernel still used as it was.
    """

    name: str
    build: Callable
    rewritten: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one way gave. `difference` is relative; None if nothing was compared."""

    verdict: str
    message: str = ""
    difference: float | None = None
    formed: tuple[str, ...] = ()
    way: str = ""
    rewritten: bool = False
    dtype: str = ""
    warned: tuple[str, ...] = ()


def setting(case: Case, dtype: str):
    """`(params, x)` of a case, the same for every tool."""
    params = {
        kernel: 0.5 * _normal(f"{case.name}/{kernel}", shape, dtype)
        for kernel, shape in case.shapes.items()
    }
    return params, _normal("x", (5, 6), dtype)


def _normal(name: str, shape, dtype):
    key = jax.random.key(zlib.crc32(name.encode()))
    # Drawn in one precision, so that all precisions judge the same model.
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def update_of(pair, roles: str, shape, scale: float):
    """scale · A·B in the kernel's shape, for a (stack…, in…, r) and b (stack…, r, out…).

    `roles` says what each axis of the kernel is: "s", "i" or "o".

    >>> pair = {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 4))}
    >>> update_of(pair, "oi", (4, 6), 0.5).shape
    (4, 6)
    """
    order = [n for role in "sio" for n, r in enumerate(roles) if r == role]
    sizes = [shape[n] for n in order]
    stack, inner = roles.count("s"), roles.count("i")
    rank = pair["a"].shape[-1]
    a = pair["a"].reshape(*sizes[:stack], -1, rank)
    b = pair["b"].reshape(*sizes[:stack], rank, -1)
    if a.shape[-2] != math.prod(sizes[stack : stack + inner]):
        raise ValueError(f"a {pair['a'].shape} is not of a kernel {shape} read as {roles!r}")
    product = (scale * a @ b).reshape(sizes)
    return product.transpose([order.index(n) for n in range(len(shape))])


def judge(case: Case, way: Way, dtype: str) -> Outcome:
    """Runs one way of writing a cell."""
    params, x = setting(case, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = way.build(params, x)
            # A tracer that leaked out of the tool raises here, as at a user's first use of it.
            jax.tree.map(lambda leaf: leaf + 0, adapted.factors)
            factors = _random_factors(adapted.factors)
            found = _run(case, adapted.run, factors, x)
            formed = tuple(formed_updates(adapted.run, factors, x)) if factors else ()
        except NotExpressible as reason:
            return Outcome("not expressible", str(reason))
        except Exception as error:  # whatever the tool raises is the cell's content
            outcome = Outcome("error", _one_line(error))
        else:
            outcome = _compare(case, adapted, factors, found, params, x, formed, dtype)
    return dataclasses.replace(
        outcome, way=way.name, rewritten=way.rewritten, dtype=dtype, warned=_said(caught)
    )


def _compare(case, adapted, factors, found, params, x, formed, dtype) -> Outcome:
    have = {kernel_of(name) for name in factors}
    missing = [kernel for kernel in case.roles if kernel not in have]
    if not have:
        return Outcome("silently wrong", _joined("no adapter was made", adapted.note))
    expected = _run(case, _oracle(case, adapted, params, dtype), factors, x)
    difference = largest_difference(found, expected)
    told = f"no adapter for {', '.join(missing)}" if missing else ""
    # `not <=`, so that a NaN is wrong.
    if not difference <= TOLERANCE[dtype]:
        told = _joined(f"differs from W + ΔW by {difference:.1g}", told)
    if told:
        return Outcome("silently wrong", _joined(told, adapted.note), difference)
    return Outcome("materialised" if formed else "low-rank", adapted.note, difference, formed)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _oracle(case, adapted, params, dtype):
    """The plain model with W + ΔW; in float64 where the tool runs in bfloat16."""
    exact = "float64" if dtype == "bfloat16" else dtype

    def merged(factors, x):
        kernels = {kernel: value.astype(exact) for kernel, value in params.items()}
        for name, pair in factors.items():
            pair = {letter: factor.astype(exact) for letter, factor in pair.items()}
            kernels[kernel_of(name)] += adapted.update(name, pair)
        return case.apply(kernels, x.astype(exact))

    return merged


def kernel_of(name: str) -> str:
    """The kernel of an adapter's name.

    >>> kernel_of("w:0")
    'w'
    """
    return name.partition(":")[0]


def _random_factors(factors):
    return {
        name: {
            letter: 0.5 * _normal(f"{name}/{letter}", factor.shape, factor.dtype)
            for letter, factor in pair.items()
        }
        for name, pair in factors.items()
    }


def _run(case, f, factors, x):
    """Outputs and derivatives with respect to the factors, under jit."""
    if case.forward_mode:
        tangents = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), factors)
        return jax.jit(lambda given: jax.jvp(lambda g: f(g, x), (given,), (tangents,)))(factors)

    def loss(given):
        y = f(given, x)
        leaves = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(leaf.astype("float64"))) for leaf in leaves), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(factors)
    return y, gradients


def largest_difference(found, expected) -> float:
    """Of the outputs over their largest entry, or of the gradients over theirs: the larger."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        mine, theirs = (
            # NumPy's: a tool may leave its result on another mesh than the oracle's.
            [np.asarray(leaf).astype("float64") for leaf in jax.tree.leaves(t)]
            for t in (mine, theirs)
        )
        if [leaf.shape for leaf in mine] != [leaf.shape for leaf in theirs]:
            return float("inf")
        size = max([float(np.max(np.abs(leaf))) for leaf in theirs], default=1.0)
        for left, right in zip(mine, theirs, strict=True):
            difference = float(np.max(np.abs(left - right))) / size
            worst = difference if not difference <= worst else worst
    return worst


def _said(caught) -> tuple[str, ...]:
    """Warnings a user would read as about the adapter: deprecations are not."""
    told = [w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)]
    return tuple(sorted({f"{w.category.__name__}: {str(w.message).splitlines()[0]}" for w in told}))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240].rstrip()
