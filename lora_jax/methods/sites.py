"""Sites: the places in a model where one adapter each sits."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule, are_disjoint

# "layers/0/c_attn/kernel[-1,0:768]", "embedding[rows]": the path, and what of it is meant. Other
# brackets belong to the parameter's own name.
_PART = re.compile(r"(?P<path>.*)\[(?:rows|(?P<axis>-\d+),(?P<start>\d+):(?P<stop>\d+))\]")


def path_of(name: str) -> str:
    """The parameter's path in the name of an adapter.

    >>> path_of("c_attn/kernel[-1,0:768]"), path_of("query/kernel")
    ('c_attn/kernel', 'query/kernel')
    """
    found = _PART.fullmatch(name)
    return found["path"] if found else name


def window_of(name: str) -> tuple[int, int, int] | None:
    """The slice in the name of an adapter: (axis, start, stop).

    >>> window_of("c_attn/kernel[-1,0:768]"), window_of("query/kernel")
    ((-1, 0, 768), None)
    """
    found = _PART.fullmatch(name)
    if not found or found["axis"] is None:
        return None
    return int(found["axis"]), int(found["start"]), int(found["stop"])


def are_apart(name: str, other: str) -> bool:
    """Whether two adapters touch nothing in common: other parameters, or other slices of one."""
    return path_of(name) != path_of(other) or are_disjoint(window_of(name), window_of(other))


def name_of(path: str, window: tuple[int, int, int] | None) -> str:
    """The adapter's name: the path, or the path with a slice."""
    return path if window is None else f"{path}[{window[0]},{window[1]}:{window[2]}]"


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapter's place: a parameter, or the slice of one that its rule names.

    `roles` has a letter for each axis of the kernel (see `core/weights.py`); `shape` is that of the
    part adapted, `kernel_shape` that of the whole parameter.
    """

    path: str
    rule: Rule
    roles: str
    kernel_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return name_of(self.path, self.rule.slice)

    @property
    def rank(self) -> int:
        return self.rule.rank

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.kernel_shape)
        if self.rule.slice:
            axis, start, stop = self.rule.slice
            shape[axis] = stop - start
        return tuple(shape)

    def sizes(self, role: str) -> tuple[int, ...]:
        """The sizes of the axes of a role: "s", "i", "o", or "r" for the rank."""
        if role == "r":
            return (self.rank,)
        return tuple(n for n, r in zip(self.shape, self.roles, strict=True) if r == role)

    def size(self, role: str) -> int:
        """All axes of a role multiplied."""
        return math.prod(self.sizes(role))

    def part_shape(self, spec: str) -> tuple[int, ...]:
        """The shape of a part whose axes have these roles: "sir" is (stack…, in…, r)."""
        return tuple(n for role in spec for n in self.sizes(role))

    def checked_factors(self, method: str, a, b):
        """`(a, b)` as a method's `factors` gave them. Raises `RequestError` for other shapes than
        (stack…, in…, k) and (stack…, k, out…)."""
        stack, ins, outs = (self.sizes(role) for role in "sio")
        a_shape, b_shape = tuple(jnp.shape(a)), tuple(jnp.shape(b))
        k = a_shape[-1] if a_shape else 0
        if (a_shape, b_shape) != ((*stack, *ins, k), (*stack, k, *outs)):
            of_a, of_b = (", ".join(map(str, x)) for x in ((*stack, *ins), (*stack, "k", *outs)))
            raise RequestError(
                f"{method}.factors of {self.name!r} {self.shape} gives a {a_shape} and b "
                f"{b_shape}; it must give a ({of_a}, k) and b ({of_b}), with any k"
            )
        return a, b

    def check(self, *, any_rank: bool) -> None:
        """Raises `RequestError` for a slice outside the kernel, or a rank above the matrix."""
        if self.rule.slice:
            axis, _, stop = self.rule.slice
            if -axis > len(self.kernel_shape) or stop > self.kernel_shape[axis]:
                raise RequestError(
                    f"slice {self.rule.slice} is outside of {self.path!r} {self.kernel_shape}; "
                    f"axes are -{len(self.kernel_shape)} … -1, and stop is at most the axis's size"
                )
            if self.roles[axis] == "s":
                raise RequestError(
                    f"slice {self.rule.slice} of {self.path!r} {self.kernel_shape} is along an "
                    "axis of stacked matrices; slice an axis of inputs or outputs"
                )
        full = min(self.size("i"), self.size("o"))
        if self.rank > full and not (any_rank or self.rule.any_rank):
            raise RequestError(
                f"rank {self.rank} is above the full rank {full} of {self.name!r} {self.shape}; "
                f"choose a rank of at most {full} or leave this parameter out"
            )

    def cut(self, kernel):
        """The part of the kernel that is adapted."""
        if not self.rule.slice:
            return kernel
        axis, start, stop = self.rule.slice
        return lax.slice_in_dim(kernel, start, stop, axis=kernel.ndim + axis)

    def widen(self, x, spec: str, fill: float = 0.0):
        """A part whose axes have these roles, as the whole kernel has it: `fill` outside."""
        at, window = self._sliced_axis(spec), self.rule.slice
        if at is None or window is None:
            return x
        axis, start, stop = window
        more = [(0, 0)] * x.ndim
        more[at] = (start, self.kernel_shape[axis] - stop)
        return jnp.pad(x, more, constant_values=fill)

    def narrow(self, x, spec: str):
        """What `widen` put into the whole kernel's part."""
        at, window = self._sliced_axis(spec), self.rule.slice
        return x if at is None or not window else lax.slice_in_dim(x, *window[1:], axis=at)

    def _sliced_axis(self, spec: str) -> int | None:
        """Which axis of a part is the one that is sliced, if any."""
        if not self.rule.slice:
            return None
        axes = [n for role in spec for n, r in enumerate(self.roles + "r") if r == role]
        place = len(self.roles) + self.rule.slice[0]
        return axes.index(place) if place in axes else None


def can_hold(leaf: Any) -> bool:
    """Whether a leaf can hold an adapter: real floats of two axes or more.

    scale · a @ b of real factors would not reach the half of a complex kernel.
    """
    is_real = trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_real and leaf.ndim >= 2
