"""A pack: cells whose adapters differ in rank, targets and scale, bound by one method.

Low-rank factors are padded with zeros to the widest rank of the pack, and a target that a cell does
not use has zeros for both. Zeros stay zeros: the gradient of a padded column of `a` passes through
the padded row of `b`, which is zero, and the other way round; Adam and weight decay of zero are
zero. The scale is that of the true rank, and data, like the dropout rate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core import trees
from lora_jax.core.apply import scale_of
from lora_jax.core.axes import KernelAxes
from lora_jax.core.rules import Rule
from lora_jax.core.weights import is_adapted
from lora_jax.methods import LoRA, Method
from lora_jax.methods.base import PyTree, Trainable


@dataclasses.dataclass(frozen=True)
class Factors:
    """What one cell does with one kernel; `roles` has a letter for each of the kernel's axes."""

    rank: int
    scale: float
    dropout: float
    roles: str

    @property
    def rank_axis_of_b(self) -> int:
        return self.roles.count("s")


@dataclasses.dataclass(frozen=True)
class Pack:
    """K methods that train as one.

    `union` binds any of them: padded ranks, all their targets. `factors` holds, for each member,
    `{path: Factors}`; `ranks` the padded rank of each path.
    """

    members: tuple[Method, ...]
    union: Method
    factors: tuple[Mapping[str, Factors], ...]
    ranks: Mapping[str, int]

    def take(self, places: Sequence[int]) -> Pack:
        """The same pack with these members only: same union, so the same shapes for each."""
        members, factors = ([of[k] for k in places] for of in (self.members, self.factors))
        return dataclasses.replace(self, members=tuple(members), factors=tuple(factors))

    def init(self, keys: Sequence[jax.Array], params: Sequence[PyTree]) -> Trainable:
        """The trainable trees of all, leaves with a leading axis K, each as it starts alone.

        `keys[k]` is the init key of member k, `params[k]` its tree; trees may differ in what is
        trained whole.
        """
        shapes = jax.eval_shape(lambda: self.union.init(keys[0], params[0])[0])
        cells = []
        for member, factors, key, tree in zip(
            self.members, self.factors, keys, params, strict=True
        ):
            own, _ = member.init(key, tree)
            cells.append(
                {
                    path: self._padded(path, own[path], factors)
                    if path in own
                    else jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), entry)
                    for path, entry in shapes.items()
                }
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells)

    def data(self) -> dict[str, dict[str, jax.Array]]:
        """`{path: {"scale": (K,), "dropout": (K,)}}`, 0 where a member does not use the path."""
        unused = Factors(0, 0.0, 0.0, "")
        return {
            path: {
                name: jnp.array([getattr(f.get(path, unused), name) for f in self.factors])
                for name in ("scale", "dropout")
            }
            for path in self.ranks
        }

    def bind(self, trainable: Trainable, frozen: tuple[Any, PyTree], *, key=None) -> PyTree:
        """One member's params tree, inside a vmap over the members; as `Method.bind`.

        `frozen` is its slice of `data()` with the base, which all share. A `key` turns dropout on.
        """
        data, frozen = frozen
        bound = self.union.bind(trainable, frozen, key=key)
        if not data:
            return bound
        tree = trees.flatten(bound, is_leaf=is_adapted)
        return tree.unflatten([_with_data(leaf, data) for leaf in tree.leaves])

    def unpack(self, trainable: Trainable, k: int) -> Trainable:
        """Member k's own trainable tree, at its true ranks and targets, out of its padded one."""
        own = {}
        for path, entry in trainable.items():
            if "value" in entry:
                own[path] = entry
            elif path in self.factors[k]:
                factors = self.factors[k][path]
                own[path] = {
                    "a": entry["a"][..., : factors.rank],
                    "b": jax.lax.slice_in_dim(
                        entry["b"], 0, factors.rank, axis=factors.rank_axis_of_b
                    ),
                }
        return own

    def _padded(self, path: str, entry, factors):
        if "value" in entry:
            return entry
        more = self.ranks[path] - factors[path].rank
        return {
            "a": _pad(entry["a"], entry["a"].ndim - 1, more),
            "b": _pad(entry["b"], factors[path].rank_axis_of_b, more),
        }


def make_pack(methods: Sequence[Method], params: PyTree) -> Pack:
    """The pack of `methods`: all plain LoRA, with one view of each kernel's axes, or all equal.

    Raises `RequestError` as their rules do.
    """
    if type(methods[0]) is not LoRA:
        return Pack(tuple(methods), methods[0], tuple({} for _ in methods), {})
    factors = tuple(factors_of(method, params) for method in methods)
    ranks: dict[str, int] = {}
    axes: dict[str, KernelAxes] = {}
    for path, own in ((path, own) for cell in factors for path, own in cell.items()):
        ranks[path] = max(own.rank, ranks.get(path, 0))
        axes[path] = KernelAxes.from_roles(own.roles)
    # The union's own alpha and dropout never count: each cell's are data. A dropout above 0 says
    # that masks are drawn at all.
    dropout = max(own.dropout for cell in factors for own in cell.values())
    union = LoRA(
        rules=[Rule(re.escape(path), rank, 1.0, dropout) for path, rank in ranks.items()],
        axes=axes,
        train=[re.escape(path) for path in methods[0].whole_paths(params)],
    )
    return Pack(tuple(methods), union, factors, ranks)


def factors_of(method: LoRA, params: PyTree) -> dict[str, Factors]:
    """`{path: Factors}` of a LoRA on `params`. Raises `RequestError` as its rules do."""
    return {
        path: Factors(rule.rank, scale_of(rule.alpha, rule.rank), rule.dropout, roles)
        for path, (rule, roles) in method.adapted(params).items()
    }


def _with_data(leaf, data):
    if not is_adapted(leaf):
        return leaf
    scale = jnp.full(leaf.scale.shape, data[leaf.path]["scale"], leaf.scale.dtype)
    dropout = None
    if leaf.dropout is not None:
        dropout = jnp.full(leaf.dropout.shape, data[leaf.path]["dropout"], leaf.dropout.dtype)
    return dataclasses.replace(leaf, scale=scale, dropout=dropout)


def _pad(x: jax.Array, axis: int, more: int) -> jax.Array:
    return jnp.pad(x, [(0, more if n == axis else 0) for n in range(x.ndim)])
