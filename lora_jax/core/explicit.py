"""Explicit sharding: meshes whose axes are part of an array's type (`AxisType.Explicit`).

There an operation raises where the types of its operands do not say how its result is split. The
model's own code says it for W and not for the factors of ΔW. So what an adapter adds is computed
with the explicit axes left to the compiler, as `jax.sharding.auto_axes` does, and then gets the
sharding of the frozen result. Without explicit axes nothing here does anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a program in which the explicit axes of `mesh` are left to the compiler."""

    mesh: Any = None  # None: no axis is explicit, and `run` and `back` change nothing

    def run(self, fun: Callable, *args):
        """`fun(*args)` within the region; what it returns has no sharding in its type."""
        if self.mesh is None:
            return fun(*args)
        auto = self.mesh.update_axis_types(dict.fromkeys(self.mesh.explicit_axes, AxisType.Auto))

        def enter(x):
            return jax.sharding.reshard(x, _whole(auto, x)) if isinstance(x, jax.Array) else x

        with jax.sharding.use_abstract_mesh(auto):
            return fun(*jax.tree.map(enter, args))

    def back(self, x, like) -> Any:
        """A result of `run` with the sharding of `like`, an array of its shape."""
        if self.mesh is None or x is None:
            return x
        sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else None
        if sharding is None or sharding.mesh.empty:
            sharding = _whole(self.mesh, x)
        return jax.sharding.reshard(x, sharding)


_NONE = Region()


def region_of(*args) -> Region:
    """The region for work on these arrays: of the current mesh, or of theirs if it has none."""
    current = jax.sharding.get_abstract_mesh()
    if current.explicit_axes:
        return Region(current)
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array) and (mesh := jax.typeof(x).sharding.mesh).explicit_axes:
            return Region(mesh)
    return _NONE


def within(fun: Callable, *args, like):
    """`fun(*args)` in a region of these arrays, with the sharding of `like`."""
    region = region_of(*args)
    return region.back(region.run(fun, *args), like)


def in_mesh(value):
    """A tree whose arrays made outside of the current mesh of explicit axes are in it, unsplit."""
    mesh = jax.sharding.get_abstract_mesh()

    def enter(x):
        if not isinstance(x, jax.Array) or not jax.typeof(x).sharding.mesh.empty:
            return x
        return jax.sharding.reshard(x, _whole(mesh, x))

    return jax.tree.map(enter, value) if mesh.explicit_axes else value


def _whole(mesh, x) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))
