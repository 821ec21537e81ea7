"""Parameters by path: how a leaf is named, taken out of a tree, and put back.

A path is the tree's own keys joined by "/": `encoder/layers/0/attention/query/kernel`. It is the
same for a dict, an `nnx.State`, an NNX module and an Equinox module; the `/value` that NNX's
variables add is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.core.errors import RequestError
from lora_jax.core.misuse import refuses_use
from lora_jax.core.nearest import nearest as nearest

PyTree = Any


def _not_bound(hole: Hole) -> str:
    return (
        "this parameter is a hole in `frozen`: `trainable` holds it whole; call "
        "apply(method.bind(trainable, frozen), …), or method.merge(trainable, frozen) for arrays"
    )


@jax.tree_util.register_static
@refuses_use(_not_bound)
@dataclasses.dataclass(frozen=True)
class Hole:
    """The empty place in `frozen` of a parameter that `trainable` holds whole: no leaves at all."""


@jax.tree_util.register_static
class Static:
    """A Python leaf of a tree (an activation, a flag) while the tree crosses a `jit`: no leaves."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return f"Static({self.value!r})"

    def __eq__(self, other) -> bool:
        same_type = isinstance(other, Static) and type(self.value) is type(other.value)
        return same_type and (self.value is other.value or bool(self.value == other.value))

    def __hash__(self) -> int:
        try:
            return hash((type(self.value), self.value))
        except TypeError:  # a leaf of no hash compares by identity or equality alone
            return hash(type(self.value))


class Stored:
    """An array of `params` that is kept in another form, such as four bits: one leaf by its path.

    It has the `shape`, `dtype`, `ndim` and `size` of the array it stands for, and never trains;
    `arrays()` are those that are kept, by name; `dequantize()` is the array it stands for,
    `layer(n)` one matrix of a stack.
    """

    shape: Any
    dtype: Any
    base: Any

    def arrays(self) -> dict[str, Any]:
        raise NotImplementedError

    def marked(self, mark: Any) -> Any:
        """The value with `mark` of each of its arrays in place of the array."""
        raise NotImplementedError

    def dequantize(self) -> Any:
        raise NotImplementedError

    def layer(self, index: int) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Flat:
    """A flattened tree: `paths[i]` names `leaves[i]`; `unflatten` puts other leaves in place."""

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    treedef: Any

    def unflatten(self, leaves) -> PyTree:
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def items(self):
        return zip(self.paths, self.leaves, strict=True)


def flatten(tree: PyTree, *, is_leaf: Callable[[Any], bool] | None = None) -> Flat:
    """Flattens `tree` with a path for each leaf; holes and stored arrays count as leaves.

    Raises `RequestError` if two leaves share a path.

    >>> flatten({"head": {"kernel": 1, "bias": 2}}).paths
    ('head/bias', 'head/kernel')
    """

    def stop(node) -> bool:
        return isinstance(node, Hole | Stored) or (is_leaf is not None and is_leaf(node))

    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    paths = tuple(_join(keys) for keys, _ in keyed)
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise RequestError(f"two parameters share the path {twice!r}; rename one of them")
    return Flat(paths, tuple(leaf for _, leaf in keyed), treedef)


def _join(keys) -> str:
    # NNX variables flatten to one child named by the attribute `value`.
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def filled(items: Iterable[Any], places: Iterable[int], values: Iterable[Any]) -> list[Any]:
    """The items with these values in their places."""
    found = list(items)
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def is_array(leaf: Any) -> bool:
    """True for arrays, tracers, shape structs and stored arrays; False for functions and alike."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct | np.generic | Stored)


def is_float(leaf: Any) -> bool:
    """True for real or complex floating arrays, in whatever form they are stored.

    Integers (counters) and random keys are never differentiated, nor is what is `Stored`.
    """
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def hide_static(tree: PyTree) -> PyTree:
    """The tree with every leaf that is no array as a `Static`: `jit` and `vmap` take the result."""
    flat = flatten(tree)
    return flat.unflatten(
        [leaf if is_array(leaf) or isinstance(leaf, Hole) else Static(leaf) for leaf in flat.leaves]
    )


def show_static(tree: PyTree) -> PyTree:
    """The inverse of `hide_static`: the tree that the model's own code takes."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Static) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, Static | Hole | Stored),
    )


def take(tree: PyTree, paths) -> tuple[dict[str, Any], PyTree]:
    """Splits `tree` into `{path: leaf}` for `paths` and the same tree with holes there."""
    wanted = set(paths)
    flat = flatten(tree)
    taken = {path: leaf for path, leaf in flat.items() if path in wanted}
    rest = [Hole() if path in wanted else leaf for path, leaf in flat.items()]
    return taken, flat.unflatten(rest)


def put(
    tree: PyTree, values: Mapping[str, Any], *, is_leaf: Callable[[Any], bool] | None = None
) -> PyTree:
    """The tree with `values[path]` in each named place; the input is untouched.

    Raises `RequestError` if a path is not in the tree or a hole is left unfilled.
    """
    flat = flatten(tree, is_leaf=is_leaf)
    unknown = set(values) - set(flat.paths)
    if unknown:
        path = min(unknown)
        raise RequestError(f"no parameter {path!r} in the tree; {nearest(path, flat.paths)}")
    leaves = [values.get(path, leaf) for path, leaf in flat.items()]
    for path, leaf in zip(flat.paths, leaves, strict=True):
        if isinstance(leaf, Hole):
            raise RequestError(
                f"parameter {path!r} is a hole in `frozen` and `trainable` does not hold it; "
                "pass the `trainable` that came from the same `init`"
            )
    return flat.unflatten(leaves)


def check_not_untied(tree: PyTree, changed) -> None:
    """Raises `RequestError` if one matrix sits at two paths and a path in `changed` is one of them.

    Parameters are tied by being one leaf; the same array at two leaves would come apart. (Vectors
    may start as one array of zeros without being tied.)
    """
    places: dict[int, str] = {}
    for path, leaf in flatten(tree).items():
        is_known = isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer)
        if not is_known or leaf.ndim < 2:
            continue
        other = places.setdefault(id(leaf), path)
        if other != path and {other, path} & set(changed):
            raise RequestError(
                f"{other!r} and {path!r} are one array, and training would part them; let the "
                "tree hold it once and the model read it at both places, or copy one of them"
            )
