"""Kernels that the model makes into one: concatenated, stacked, added, or as `re + i·im`.

The frozen kernels are joined by the model's own equation. Each adapter takes a share of the rank of
one `LoRAWeight`, zeros where another has its rows or columns: as exact as the parts, never dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jaxprs
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.grouped import GroupedWeight
from lora_jax.core.interpreter import rule_for
from lora_jax.core.trees import Stored
from lora_jax.core.values import RANK, AdaptedValue, is_adapted
from lora_jax.core.weights import GainWeight, LoRAWeight


@dataclasses.dataclass(frozen=True)
class Join:
    """One equation that makes `shapes[n]` for each part n into one array.

    Fields: `bind`, the equation on plain arrays; `factors`, what it multiplies each part by;
    `axis`, along which the parts follow each other, None where they lie over each other.
    """

    bind: Callable[[list[jax.Array]], jax.Array]
    shapes: Sequence[tuple[int, ...]]
    factors: Sequence[complex]
    axis: int | None = None

    def of(self, parts: Sequence[Any]) -> Any:
        """The parts as one value, adapted if one of them is; None where it has no such form."""
        kinds = {type(part) for part in parts if is_adapted(part)}
        if not kinds:
            return self.bind(list(parts))
        kind = GainWeight if GainWeight in kinds else LoRAWeight
        mine: dict[int, Any] = {n: part for n, part in enumerate(parts) if type(part) is kind}
        roles = {part.current_roles for part in mine.values()}
        if not kinds <= {GainWeight, LoRAWeight} or len(roles) > 1:
            return None
        beneath = self.of([part.kernel if n in mine else part for n, part in enumerate(parts)])
        if beneath is None:
            return None
        return self._gained(mine, beneath) if kind is GainWeight else self._adapted(mine, beneath)

    def _gained(self, mine: dict[int, GainWeight], beneath) -> GainWeight | None:
        """Along an axis that the gains have, they follow each other too."""
        first = next(iter(mine.values()))
        axes = first.side_axes("gain")
        if self.axis is None or self.axis not in axes:
            return None
        gains = [
            mine[n].gain if n in mine else jnp.ones([shape[axis] for axis in axes])
            for n, shape in enumerate(self.shapes)
        ]
        dtype = float32_or_wider(*(gain.dtype for gain in gains))
        gain = lax.concatenate([g.astype(dtype) for g in gains], axes.index(self.axis))
        return GainWeight(kernel=beneath, gain=gain, roles=first.current_roles, path=_path(mine))

    def _adapted(self, mine: dict[int, LoRAWeight], beneath) -> LoRAWeight | None:
        first = next(iter(mine.values()))
        if len({part.key is None for part in mine.values()}) > 1:
            return None
        a_axes, b_axes = first.side_axes("a"), first.side_axes("b")
        wide = float32_or_wider(*(x.dtype for part in mine.values() for x in (part.a, part.b)))
        # Every scale goes into its `a`, before they lie in one array.
        scaled = {n: p.scaled(p.a.astype(wide), a_axes) for n, p in mine.items()}
        scaled = {n: self._laid(n, x * self.factors[n], a_axes) for n, x in scaled.items()}
        bs = [self._laid(n, part.b.astype(wide), b_axes) for n, part in mine.items()]
        common = jnp.result_type(*(x.dtype for x in scaled.values()))
        a = lax.concatenate([x.astype(common) for x in scaled.values()], a_axes.index(RANK))
        stack = [a.shape[a_axes.index(axis)] for axis in first.axes("s")]

        def over_stack(x):
            return None if x is None else jnp.broadcast_to(x.reshape(-1)[0], stack)

        key = over_stack(first.key)
        if key is not None:
            # A product with the whole is no product with one of the parts: a mask of its own.
            fold = jax.random.fold_in
            for _ in stack:
                fold = jax.vmap(fold, (0, None))
            key = fold(key, len(self.shapes))
        return LoRAWeight(
            kernel=beneath,
            a=a,
            b=lax.concatenate(bs, b_axes.index(RANK)),
            scale=jnp.ones(stack, wide),
            key=key,
            dropout=over_stack(None if first.dropout is None else jnp.asarray(first.dropout)),
            roles=first.current_roles,
            path=_path(mine),
        )

    def _laid(self, n: int, x, x_axes):
        """A factor of part n in the shape of the whole: zeros where the other parts are."""
        if self.axis is None or self.axis not in x_axes:
            return x
        sizes = [shape[self.axis] for shape in self.shapes]
        around = [(0, 0, 0)] * x.ndim
        around[x_axes.index(self.axis)] = (sum(sizes[:n]), sum(sizes[n + 1 :]), 0)
        return lax.pad(x, jnp.zeros((), x.dtype), around)


def _path(parts: Mapping[int, AdaptedValue]) -> str:
    return ", ".join(dict.fromkeys(part.path for part in parts.values()))


def as_arrays(interpreter, eqn, value, reason: str) -> Any:
    """The value with its frozen array as it is, where that is kept in another form or shape."""
    if isinstance(value, Stored | GroupedWeight):
        return interpreter.plain([value], eqn, reason)[0]
    if is_adapted(value):
        beneath = as_arrays(interpreter, eqn, value.kernel, reason)
        return dataclasses.replace(value, kernel=beneath)
    return value


def joined(interpreter, eqn, values, bind, factors=None, axis=None) -> Any:
    """The result of a rule for an equation that joins `values`; None where it has no such form."""
    join = Join(bind, [tuple(x.shape) for x in values], factors or [1] * len(values), axis)
    return join.of([as_arrays(interpreter, eqn, x, "made into one kernel") for x in values])


@rule_for("concatenate")
def _concatenate(interpreter, eqn, values):
    axis = eqn.params["dimension"]
    return joined(interpreter, eqn, values, lambda x: lax.concatenate(x, axis), axis=axis)


@rule_for("stack")
def _stack(interpreter, eqn, values):
    axis = eqn.params["axis"]
    shape = [*values[0].shape]
    shape.insert(axis, 1)
    parts = [x.reshape(tuple(shape)) for x in values]
    if any(part is None for part in parts):
        return None
    return joined(interpreter, eqn, parts, lambda x: lax.concatenate(x, axis), axis=axis)


@rule_for("complex")
def _complex(interpreter, eqn, values):
    return joined(interpreter, eqn, values, lambda x: jaxprs.bind(eqn, x)[0], [1, 1j])
