"""How the arrays of an adapted value are split over a mesh where its kernel is: a rank never is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.trees import Stored
from lora_jax.core.values import RANK, is_adapted


def _rebuilt(value: Any, of_array: Callable, of_side: Callable[[list, Any], Any]) -> Any:
    """The value with `of_array` of what is frozen, and `of_side(its axes, array)` of its sides.

    What is stored in another form is frozen as it is.
    """
    if not is_adapted(value) or isinstance(value, Stored):
        return of_array(value)
    sides = {name: of_side(value.side_axes(name), x) for name, x in value.sides().items()}
    kernel = _rebuilt(value.kernel, of_array, of_side)
    return dataclasses.replace(value, kernel=kernel, **sides)


def _side_spec(spec: PartitionSpec, axes: list) -> PartitionSpec:
    of_axis = {**dict(enumerate(spec)), RANK: None}
    return PartitionSpec(*(of_axis.get(axis) for axis in axes))


def specs_of(value: Any, spec: PartitionSpec) -> Any:
    """The PartitionSpecs of a value's arrays, from that of its kernel."""
    return _rebuilt(value, lambda _: spec, lambda axes, _: _side_spec(spec, axes))


def placed(value: Any, put: Callable, put_side: Callable) -> Any:
    """The value with the arrays it is made of put elsewhere: the frozen one, and its sides."""

    def frozen(x):
        return x.marked(put) if isinstance(x, Stored) else put(x)

    return _rebuilt(value, frozen, lambda _, x: put_side(x))


def resharded(value: Any, sharding: NamedSharding, put: Callable = jax.sharding.reshard) -> Any:
    """A value whose kernel has this sharding in its type, and its sides what follows from it.

    What is stored in another form stays: the array it stands for gets its sharding where it is
    formed.
    """

    def put_side(axes, x):
        return put(x, NamedSharding(sharding.mesh, _side_spec(sharding.spec, axes)))

    return _rebuilt(value, lambda x: x if isinstance(x, Stored) else put(x, sharding), put_side)


def sides_split(value: Any, spec: PartitionSpec) -> Any:
    """The value with its sides split by a shard_map's spec of the kernel, in the type too where the
    current mesh has explicit axes: JAX compares the two."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return value

    def explicit(names):
        every = names if isinstance(names, tuple) else (names,)
        return tuple(n for n in every if n in mesh.explicit_axes) or None

    typed = PartitionSpec(*(explicit(names) for names in spec))

    def put_side(axes, x):
        return jax.sharding.reshard(x, NamedSharding(mesh, _side_spec(typed, axes)))

    return _rebuilt(value, lambda x: x, put_side)


def typed_as(value: Any, aval: Any) -> Any:
    """The value with the sharding that this type of its array names, if it names explicit axes."""
    sharding: Any = getattr(aval, "sharding", None)
    if not getattr(getattr(sharding, "mesh", None), "explicit_axes", ()):
        return value
    array = value.base if is_adapted(value) else value
    if isinstance(array, jax.Array) and jax.typeof(array).sharding == sharding:
        return value
    return resharded(value, sharding)
