"""How the arrays of an adapted value are split over a mesh where its kernel is: a rank never is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.trees import Stored
from lora_jax.core.values import RANK, is_adapted


def specs_of(value: Any, spec: PartitionSpec) -> Any:
    """The PartitionSpecs of a value's arrays, from that of its kernel."""
    if not is_adapted(value):
        return spec
    kernel = specs_of(value.kernel, spec)
    return dataclasses.replace(value, kernel=kernel, **_of_sides(value, spec))


def _of_sides(value, spec) -> dict[str, PartitionSpec]:
    of_axis = {**dict(enumerate(spec)), RANK: None}
    return {
        name: PartitionSpec(*(of_axis.get(axis) for axis in value.side_axes(name)))
        for name in value.sides()
    }


def resharded(value: Any, sharding: NamedSharding, put: Callable = jax.sharding.reshard) -> Any:
    """A value whose kernel has this sharding in its type, and its sides what follows from it.

    What is stored in another form stays: the array it stands for gets its sharding where it is
    formed.
    """
    if isinstance(value, Stored):
        return value
    if not is_adapted(value):
        return put(value, sharding)
    specs = _of_sides(value, sharding.spec)
    sides = {
        name: put(x, NamedSharding(sharding.mesh, specs[name])) for name, x in value.sides().items()
    }
    return dataclasses.replace(value, kernel=resharded(value.kernel, sharding, put), **sides)


def sides_split(value: Any, spec: PartitionSpec) -> Any:
    """The value with its sides split by a shard_map's spec of the kernel, in the type too where the
    current mesh has explicit axes: JAX compares the two."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes or not is_adapted(value):
        return value

    def explicit(names):
        every = names if isinstance(names, tuple) else (names,)
        return tuple(n for n in every if n in mesh.explicit_axes) or None

    typed = PartitionSpec(*(explicit(names) for names in spec))
    sides = {
        name: jax.sharding.reshard(value.sides()[name], NamedSharding(mesh, own))
        for name, own in _of_sides(value, typed).items()
    }
    return dataclasses.replace(value, kernel=sides_split(value.kernel, spec), **sides)


def typed_as(value: Any, aval: Any) -> Any:
    """The value with the sharding that this type of its array names, if it names explicit axes."""
    sharding: Any = getattr(aval, "sharding", None)
    if not getattr(getattr(sharding, "mesh", None), "explicit_axes", ()):
        return value
    array = value.base if is_adapted(value) else value
    if isinstance(array, jax.Array) and jax.typeof(array).sharding == sharding:
        return value
    assert sharding is not None  # its mesh has axes
    return resharded(value, sharding)
