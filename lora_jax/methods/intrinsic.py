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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.core import trees
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.values import is_adapted
from lora_jax.methods.base import PyTree, Trainable
from lora_jax.methods.merging import STORED, check_finite, checked_dtype
from lora_jax.methods.projections import dense, fastfood, grouped
from lora_jax.methods.rows import matching
from lora_jax.methods.subspace import Subspace

NAME = "intrinsic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntrinsicDimension(Subspace):
    """Moves the parameters that `targets` match together, in a random subspace of `dim` dimensions.

    `targets`: as in `Rule`; all floating-point parameters by default, except those that `train`
    names, which train whole (a new head). `dim`: all that trains in the subspace, SAID's λ
    included. `projection`: "fastfood"; "dense" for networks small enough to hold P (D, dim); or
    "grouped", the cheapest: dim groups of parameters move by one number each.
    `structure`: "did", or "said", with a λ for each layer (a path up to the first whole number
    among its keys) and for each other top-level part (embeddings, a pooler; layers that are stacked
    in one parameter).

    `trainable["intrinsic"]` holds `theta (dim − m,)` and SAID's `scales (m,)` (see `Subspace`). It
    moves all of it together and cannot be combined with another method. Raises `RequestError` for
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
    NAME: ClassVar = NAME
    PROJECTIONS: ClassVar = {"fastfood": fastfood, "dense": dense, "grouped": grouped}
    CHOICES: ClassVar = {"projection": PROJECTIONS, "structure": ("did", "said")}

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def moved(self, params: PyTree) -> dict[str, int]:
        """`{path: number of parameters}` of what moves, in the tree's order: the order in θ."""
        return self._sizes(params, frozenset(self.whole_paths(params)))

    def _sizes(self, params: PyTree, whole: frozenset[str]) -> dict[str, int]:
        leaves = dict(trees.flatten(params, is_leaf=is_adapted).items())
        found = matching("targets", self.targets, params, self.aliases)
        moved = {path: leaves[path].size for path in found if path not in whole}
        if not moved:
            raise RequestError(
                f"targets={self.targets!r} name nothing but what train={self.train!r} trains whole"
            )
        if (taken := sum(moved.values())) < self.dim:
            raise RequestError(
                f"dim is {self.dim}, but only {taken:,} parameters move; choose a smaller one"
            )
        self._num_scales(moved)  # for its check
        return moved

    def _num_scales(self, moved: Mapping[str, int]) -> int:
        num = len({_group_of(path) for path in moved}) if self.structure == "said" else 0
        if num >= self.dim:
            raise RequestError(
                f"dim is {self.dim}, but structure='said' needs {num} of it for the scales of the "
                f"layers; choose at least {num + 1}"
            )
        return num

    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        moved = self._sizes(params, whole)
        trees.check_not_untied(params, moved)
        num = self._num_scales(moved)
        scales = {"scales": jnp.ones(num, jnp.float32)} if num else {}
        return self._entry(key, moved, theta=jnp.zeros(self.dim - num, jnp.float32), **scales)

    def _bind_over(self, trainable, frozen, *, key, data, beneath) -> PyTree:
        rest = {name: entry for name, entry in trainable.items() if name != NAME}
        tree = super()._bind_over(rest, frozen, key=key, data=data, beneath=beneath)
        if NAME not in trainable:
            return tree
        whole = frozenset(name for name, entry in rest.items() if "value" in entry)
        moved = self._sizes(tree, whole)
        leaves = dict(trees.flatten(tree, is_leaf=is_adapted).items())
        if under := [path for path in moved if is_adapted(leaves[path])]:
            raise RequestError(
                f"{under[0]!r} holds an adapter already; a subspace moves plain parameters alone"
            )
        entry = trainable[NAME]
        if NAME in data:
            # In a pack over several d: what lies beyond a cell's own plays no part, and stays 0.
            is_own = jnp.arange(entry["theta"].shape[0]) < data[NAME]["width"]
            entry = {**entry, "theta": jnp.where(is_own, entry["theta"], 0)}
        delta = self._delta(entry, moved)
        values = {path: _moved_by(leaves[path], delta[path]) for path in moved}
        return trees.put(tree, values, is_leaf=is_adapted)

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
        found = self._steps(entry, moved)
        if self.structure != "said":
            return found
        groups = {path: _group_of(path) for path in moved}
        place = {group: n for n, group in enumerate(dict.fromkeys(groups.values()))}
        return {path: entry["scales"][place[groups[path]]] * found[path] for path in moved}

    def merge(self, trainable: Trainable, frozen: PyTree, *, dtype: Any = None) -> PyTree:
        dtype, moved = checked_dtype(dtype), {}
        if NAME in trainable:
            whole = frozenset(name for name, entry in trainable.items() if "value" in entry)
            moved = self._sizes(frozen, whole)
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

    def theta_size(self, params: PyTree) -> int:
        """How many numbers θ has: dim, less SAID's λ."""
        return self.dim - self._num_scales(self.moved(params))


def _moved_by(leaf: jax.Array, flat: jax.Array) -> jax.Array:
    """θ₀ + the step, summed in float32 or wider and rounded once."""
    wide = leaf.astype(float32_or_wider(leaf.dtype, flat.dtype))
    return (wide + flat.reshape(leaf.shape)).astype(leaf.dtype)


def _group_of(path: str) -> str:
    keys = path.split("/")
    place = next((n for n, key in enumerate(keys) if key.isdecimal()), 0)
    return "/".join(keys[: place + 1])
