"""Training in a random subspace: how few dimensions a task needs.

θ = θ₀ + P θ_d, θ_d (d,) starts at zero and trains, P is fixed and random. The smallest d that
reaches 90% of what training all parameters reaches is the intrinsic dimension of the task, d₉₀.
Li et al. 2018 (arXiv:1804.08838), Eq. (2); for fine-tuning Aghajanyan et al. 2020
(arXiv:2012.13255): DID as above, and SAID, θᵢ = θ₀ᵢ + λᵢ (P θ_{d−m})ᵢ with a trained λᵢ, 1 at
first, for each of m layers, which count among the d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.core import trees
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import check_each_matches, pattern_of
from lora_jax.core.values import is_adapted
from lora_jax.methods.base import Method, PyTree, Trainable
from lora_jax.methods.merging import STORED, check_finite, checked_dtype
from lora_jax.methods.projections import dense, fastfood, grouped
from lora_jax.methods.subspace import (
    check_dim,
    check_layout,
    key_numbers,
    key_of,
    layout_of,
    probe,
)
from lora_jax.methods.table import Row

# The one entry of `trainable`: it is of all moved parameters together.
NAME = "intrinsic"
PROJECTIONS = MappingProxyType({"fastfood": fastfood, "dense": dense, "grouped": grouped})
STRUCTURES = ("did", "said")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntrinsicDimension(Method):
    """Moves the parameters that `targets` match together, in a random subspace of `dim` dimensions.

    `targets`: as in `Rule`; all floating-point parameters by default, but for those that `train`
    names, which train whole beside (a new head). `dim`: all that trains in the subspace, SAID's λ
    included. `projection`: "fastfood"; "dense" for networks small enough to hold P (D, dim); or
    "grouped", the cheapest: dim groups of parameters move by one number each.
    `structure`: "did", or "said", with a λ for each layer (a path up to the first whole number
    among its keys) and for each other top-level part (embeddings, a pooler; layers that are stacked
    in one parameter).

    `trainable["intrinsic"]` holds, in float32, `theta (dim − m,)`, SAID's `scales (m,)`, and what
    does not train: `key`, which says which subspace it is, and `layout`, a hash of what moves. It
    moves all of it together, so that it goes beside no other method. Raises `RequestError` for
    values outside.

    >>> params = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
    >>> method = IntrinsicDimension(dim=3)
    >>> trainable, frozen = method.init(jax.random.key(0), params)
    >>> trainable["intrinsic"]["theta"].shape, method.table(params).num_trainable
    ((3,), 3)
    """

    dim: int = dataclasses.field(
        default=100, metadata={"help": "dimension of the subspace", "role": "lane"}
    )
    targets: str | Sequence[str] = r".*"
    projection: str = dataclasses.field(
        default="fastfood", metadata={"help": "fastfood, dense or grouped"}
    )
    structure: str = dataclasses.field(
        default="did", metadata={"help": "did, or said: a scale for each layer"}
    )

    TITLE: ClassVar = "random subspace"
    FROZEN_PARTS: ClassVar = frozenset({"key", "layout"})
    EXCLUSIVE: ClassVar = True

    def __post_init__(self):
        check_dim(self.dim)
        for name, known in (("projection", PROJECTIONS), ("structure", STRUCTURES)):
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"{name} is {value!r}; {trees.nearest(str(value), known)}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def moved(self, params: PyTree) -> dict[str, int]:
        """`{path: number of parameters}` of what moves, in the tree's order: the order in θ."""
        return self._moved(params, frozenset(self.whole_paths(params)))

    def _moved(self, params: PyTree, whole: frozenset[str]) -> dict[str, int]:
        leaves = dict(trees.flatten(params, is_leaf=is_adapted).items())
        floats = [p for p, x in leaves.items() if is_adapted(x) or trees.is_float(x)]
        check_each_matches("targets", self.targets, floats, self.aliases)
        pattern = pattern_of(self.targets, self.aliases)
        moved = {p: leaves[p].size for p in floats if p not in whole and pattern.fullmatch(p)}
        if not moved:
            raise RequestError(
                f"targets={self.targets!r} name nothing but what train={self.train!r} trains whole"
            )
        if stored := [path for path in moved if isinstance(leaves[path], trees.Stored)]:
            raise RequestError(
                f"{stored[0]!r} is quantised; a random subspace moves plain parameters alone"
            )
        if (taken := sum(moved.values())) < self.dim:
            raise RequestError(
                f"dim is {self.dim}, but only {taken:,} parameters move; choose a smaller one"
            )
        return moved

    def _groups(self, moved: Mapping[str, int]) -> list[int]:
        """For each moved parameter the number of its λ."""
        names = [_group_of(path) for path in moved]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        if self.structure == "said" and len(numbers) >= self.dim:
            raise RequestError(
                f"dim is {self.dim}, but structure='said' needs {len(numbers)} of it for the "
                f"scales of the layers; choose at least {len(numbers) + 1}"
            )
        return [numbers[name] for name in names]

    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        moved = self._moved(params, whole)
        trees.check_not_untied(params, moved)
        groups = self._groups(moved)
        entry: dict[str, jax.Array] = {"key": key_numbers(key), "layout": layout_of(moved)}
        num = self.dim
        if self.structure == "said":
            entry["scales"] = jnp.ones(max(groups) + 1, jnp.float32)
            num -= max(groups) + 1
        return {NAME: {**entry, "theta": jnp.zeros(num, jnp.float32)}}

    def _bind_over(self, trainable, frozen, *, key, data, beneath) -> PyTree:
        rest = {name: entry for name, entry in trainable.items() if name != NAME}
        tree = super()._bind_over(rest, frozen, key=key, data=data, beneath=beneath)
        if NAME not in trainable:
            return tree
        whole = frozenset(name for name, entry in rest.items() if "value" in entry)
        moved = self._moved(tree, whole)
        leaves = dict(trees.flatten(tree, is_leaf=is_adapted).items())
        if under := [path for path in moved if is_adapted(leaves[path])]:
            raise RequestError(
                f"{under[0]!r} holds an adapter already; a subspace moves plain parameters alone"
            )
        delta = self._delta(self._cut(trainable[NAME], data), moved)
        return trees.put(
            tree,
            {path: _moved_by(leaves[path], delta[path]) for path in moved},
            is_leaf=is_adapted,
        )

    @staticmethod
    def _cut(entry, data):
        """In a pack over several d: what lies beyond a cell's own d plays no part, and stays 0."""
        if not data or NAME not in data:
            return entry
        is_own = jnp.arange(entry["theta"].shape[0]) < data[NAME]["width"]
        return {**entry, "theta": jnp.where(is_own, entry["theta"], 0)}

    def _delta(self, entry: Mapping[str, jax.Array], moved: Mapping[str, int]) -> dict[str, Any]:
        """`{path: flat (size,)}`: λ P θ."""
        parts = {"key", "layout", "theta"} | ({"scales"} if self.structure == "said" else set())
        if set(entry) != parts:
            raise RequestError(
                f"{NAME!r} holds {sorted(entry)}, but structure={self.structure!r} has "
                f"{sorted(parts)}; use the method that made it"
            )
        num = sum(x.size for name, x in entry.items() if name not in self.FROZEN_PARTS)
        if num != self.dim:
            raise RequestError(
                f"{NAME!r} holds {num} dimensions, dim is {self.dim}; use the method that made it"
            )
        check_layout(NAME, entry["layout"], moved)
        project = PROJECTIONS[self.projection]
        steps = project(entry["theta"], sum(moved.values()), key_of(entry["key"]))
        # Split, not sliced: the adjoint is one concatenation, where that of each slice passes over
        # all that moves (100 slices of MiniLM's 10.7 million: 1 s of a step on a CPU, not 0.1).
        found = dict(zip(moved, jax.lax.split(steps, tuple(moved.values())), strict=True))
        if self.structure != "said":
            return found
        groups = zip(moved, self._groups(moved), strict=True)
        return {path: entry["scales"][group] * found[path] for path, group in groups}

    def merge(self, trainable: Trainable, frozen: PyTree, *, dtype: Any = None) -> PyTree:
        dtype, moved = checked_dtype(dtype), {}
        if NAME in trainable:
            whole = frozenset(name for name, entry in trainable.items() if "value" in entry)
            moved = self._moved(frozen, whole)
        leaves = dict(trees.flatten(frozen, is_leaf=is_adapted).items())
        if dtype not in (None, STORED):
            # What is bound is summed already, and rounded to the base's dtype: here to this one.
            wide = {p: leaves[p].astype(float32_or_wider(leaves[p].dtype, dtype)) for p in moved}
            frozen = trees.put(frozen, wide, is_leaf=is_adapted)
        tree = super().merge(trainable, frozen, dtype=dtype)
        sums = dict(trees.flatten(tree).items())
        own = None if dtype == STORED else dtype
        values = {p: sums[p].astype(own or leaves[p].dtype) for p in moved}
        for path, value in values.items():
            check_finite(path, value)
        return trees.put(tree, values)

    def drawn(self, trainable: Trainable) -> dict[str, list[float]]:
        entry = trainable[NAME]
        project = PROJECTIONS[self.projection]
        return {"P": probe(project, entry["key"], entry["theta"].shape[0])}

    def theta_size(self, params: PyTree) -> int:
        """How many numbers θ has: dim, less SAID's λ."""
        groups = self._groups(self.moved(params))
        return self.dim - (max(groups) + 1 if self.structure == "said" else 0)

    def owns(self, name: str) -> bool:
        return name == NAME

    def table(self, params: PyTree):
        table, moved = super().table(params), self.moved(params)
        self._groups(moved)  # for its check
        row = Row(NAME, (sum(moved.values()),), None, None, self.dim)
        return dataclasses.replace(table, rows=(row, *table.rows))

    def mask(self, tree: PyTree) -> PyTree:
        """Raises `RequestError`: all that is bound is computed from what trains."""
        return self._mask_of(NAME, None)


def _moved_by(leaf: jax.Array, flat: jax.Array) -> jax.Array:
    """θ₀ + the step, summed in float32 or wider and rounded once."""
    wide = leaf.astype(float32_or_wider(leaf.dtype, flat.dtype))
    return (wide + flat.reshape(leaf.shape)).astype(leaf.dtype)


def _group_of(path: str) -> str:
    keys = path.split("/")
    place = next((n for n, key in enumerate(keys) if key.isdecimal()), 0)
    return "/".join(keys[: place + 1])
