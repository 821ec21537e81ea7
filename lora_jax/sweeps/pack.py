"""A pack: cells whose adapters differ in rank, targets and scale, as one method.

Low-rank factors are padded with zeros to the widest rank of the pack, and a target that a cell does
not use has zeros for both. Zeros stay zeros: the gradient of a padded column of `a` passes through
the padded row of `b`, which is zero, and the other way round; Adam and weight decay of zero are
zero. The scale is that of the true rank, and data, like the dropout rate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core import trees
from lora_jax.core.apply import scale_of
from lora_jax.core.rules import Rule
from lora_jax.core.weights import is_adapted
from lora_jax.methods import LoRA, Method
from lora_jax.methods.base import PyTree, Trainable

_UNUSED = (0, 0.0, 0.0, 0)


@dataclasses.dataclass(frozen=True)
class Pack:
    """K methods that train as one. `union` binds any of them: padded ranks, all their targets.

    `adapted` holds, for each member, `{path: (rank, scale, dropout, number of stack axes)}`.
    """

    members: tuple[Method, ...]
    union: Method
    adapted: tuple[dict[str, tuple[int, float, float, int]], ...]
    ranks: dict[str, int]

    def init(self, keys: Sequence[jax.Array], params: PyTree) -> tuple[Trainable, Any]:
        """`(trainable, bundle)`: leaves with a leading axis K, each cell as it starts alone.

        `keys[k]` is the init key of cell k; `bundle` is what `bind` takes in the place of `frozen`,
        of which only the first part has the axis K (`bundle_axes`).
        """
        cells = []
        for member, adapted, key in zip(self.members, self.adapted, keys, strict=True):
            trainable, frozen = member.init(key, params)
            cells.append(self._padded(trainable, adapted))
        shapes = jax.eval_shape(lambda: self.union.init(keys[0], params)[0])
        cells = [self._completed(cell, shapes) for cell in cells]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells), (self._data(), frozen)

    @property
    def bundle_axes(self) -> tuple[int, None]:
        """`in_axes` of the bundle: the cells' own data along the first axis, the base shared."""
        return (0, None)

    def bind(self, trainable: Trainable, bundle: Any, *, key: jax.Array | None = None) -> PyTree:
        """One cell's params tree, inside a vmap over the cells. A `key` turns dropout on."""
        data, frozen = bundle
        if not data:
            return self.union.bind(trainable, frozen, key=key)
        tree = trees.flatten(self.union.bind(trainable, frozen, key=key), is_leaf=is_adapted)
        return tree.unflatten([_with_data(leaf, data) for leaf in tree.leaves])

    def unpack(self, trainable: Trainable, k: int) -> Trainable:
        """Cell k's own trainable tree, at its true ranks and targets, out of its padded one."""
        own = {}
        for path, entry in trainable.items():
            if "value" in entry:
                own[path] = entry
            elif path in self.adapted[k]:
                rank, _, _, stack = self.adapted[k][path]
                own[path] = {
                    "a": entry["a"][..., :rank],
                    "b": jax.lax.slice_in_dim(entry["b"], 0, rank, axis=stack),
                }
        return own

    def padding(self, trainable: Trainable, k: int) -> list[jax.Array]:
        """What of cell k's padded tree is not its own: all of it must be zero, for ever."""
        rest = []
        for path, entry in trainable.items():
            if "value" in entry:
                continue
            rank, _, _, stack = self.adapted[k].get(path, (0, 0.0, 0.0, entry["b"].ndim - 2))
            rest.append(entry["a"][..., rank:])
            rest.append(jax.lax.slice_in_dim(entry["b"], rank, entry["b"].shape[stack], axis=stack))
        return [part for part in rest if part.size]

    def _padded(self, trainable: Trainable, adapted) -> Trainable:
        padded = {}
        for path, entry in trainable.items():
            if "value" not in entry:
                rank, _, _, stack = adapted[path]
                more = self.ranks[path] - rank
                entry = {
                    "a": _pad(entry["a"], entry["a"].ndim - 1, more),
                    "b": _pad(entry["b"], stack, more),
                }
            padded[path] = entry
        return padded

    def _completed(self, cell: Trainable, shapes) -> Trainable:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return {path: cell.get(path, zeros[path]) for path in shapes}

    def _data(self) -> dict[str, dict[str, jax.Array]]:
        """`{path: {"scale": (K,), "dropout": (K,)}}`, 0 where a cell does not use the path."""
        return {
            path: {
                name: jnp.array([cell.get(path, _UNUSED)[place] for cell in self.adapted])
                for name, place in (("scale", 1), ("dropout", 2))
            }
            for path in self.ranks
        }


def make_pack(methods: Sequence[Method], params: PyTree) -> Pack:
    """The pack of `methods`, which all are LoRA, or all equal. Raises what their rules raise."""
    if not isinstance(methods[0], LoRA):
        return Pack(tuple(methods), methods[0], tuple({} for _ in methods), {})
    whole = methods[0].whole_paths(params)
    adapted, ranks, dropout = [], {}, 0.0
    for method in methods:
        cell = {}
        for path, (rule, roles) in method.adapted(params).items():
            scale = scale_of(rule.alpha, rule.rank)
            cell[path] = (rule.rank, scale, rule.dropout, roles.count("s"))
            ranks[path] = max(rule.rank, ranks.get(path, 0))
            dropout = max(dropout, rule.dropout)
        adapted.append(cell)
    # The union's own alpha and dropout never count: each cell's are data. A dropout above 0 says
    # that masks are drawn at all.
    union = LoRA(
        rules=[Rule(re.escape(path), rank, 1.0, dropout) for path, rank in ranks.items()],
        axes=methods[0].axes,
        train=[re.escape(path) for path in whole],
    )
    return Pack(tuple(methods), union, tuple(adapted), ranks)


def _with_data(leaf, data):
    if not is_adapted(leaf):
        return leaf
    scale = jnp.full(leaf.scale.shape, data[leaf.path]["scale"], leaf.scale.dtype)
    dropout = None
    if leaf.dropout is not None:
        dropout = jnp.full(leaf.dropout.shape, data[leaf.path]["dropout"], leaf.dropout.dtype)
    return dataclasses.replace(leaf, scale=scale, dropout=dropout)


def _pad(x: jax.Array, axis: int, more: int) -> jax.Array:
    widths = [(0, more if n == axis else 0) for n in range(x.ndim)]
    return jnp.pad(x, widths)
