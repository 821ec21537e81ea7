"""`Method`: what trains and what stays frozen. The central contract of the project.

Split first, then differentiate: `init` gives `(trainable, frozen)`, gradients are taken with
respect to `trainable` only, and `bind` puts both together into a tree that a lifted model takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import pattern_of
from lora_jax.core.weights import is_adapted
from lora_jax.methods.table import MethodTable, Row

PyTree = Any
Trainable = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share: parameters trained whole, named by `train`.

    `train`: a regular expression over whole paths, aliases joined by commas, or a sequence of
    either: a task head, biases, norms. `aliases`: `{name: expression}` of the model family. A
    method is immutable and holds no arrays.
    """

    train: str | Sequence[str] = ()
    aliases: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)

    def init(self, key: jax.Array, params: PyTree) -> tuple[Trainable, PyTree]:
        """Splits `params` into `(trainable, frozen)`; `params` is untouched.

        `trainable` is `{path: {"a": …, "b": …}}` for adapters and `{path: {"value": …}}` for
        parameters trained whole (copies, so that they may be donated). `frozen` is `params` with
        holes where `trainable` holds the parameter. Raises `RequestError` if a rule matches
        nothing.
        """
        whole = self.whole_paths(params)
        values, frozen = trees.take(params, whole)
        trainable = {path: {"value": jnp.array(values[path], copy=True)} for path in whole}
        return {**self._init_adapters(key, params, frozenset(whole)), **trainable}, frozen

    def bind(self, trainable: Trainable, frozen: PyTree, *, key: jax.Array | None = None) -> PyTree:
        """The params tree for a lifted model: adapted values sit where arrays sat.

        `frozen` may be what `init` gave or the full tree: what `trainable` holds wins. A `key`
        turns adapter dropout on. Raises `RequestError` for a path that the tree lacks.
        """
        flat = trees.flatten(frozen, is_leaf=is_adapted)
        kernels = dict(flat.items())
        values = {}
        for path, entry in trainable.items():
            if "value" in entry:
                values[path] = entry["value"]
            elif path in kernels:
                values[path] = self._bind_adapter(path, kernels[path], entry, key)
            else:
                raise RequestError(
                    f"the adapter of {path!r} has no parameter in this tree; "
                    f"{trees.nearest(path, flat.paths)}"
                )
        return trees.put(frozen, values)

    def merge(self, trainable: Trainable, frozen: PyTree) -> PyTree:
        """Plain parameters with the adapters folded in (W + ΔW): same shapes and dtypes.

        The sum is made in float32 or wider and rounded once to the kernel's dtype. Inputs are
        untouched. Source: Hu et al. 2021, §4.1, "no additional inference latency".
        """
        bound = trees.flatten(self.bind(trainable, frozen), is_leaf=is_adapted)
        return bound.unflatten(
            [leaf.materialise() if is_adapted(leaf) else leaf for leaf in bound.leaves]
        )

    def mask(self, tree: PyTree) -> PyTree:
        """A tree of booleans, True exactly on the leaves that train.

        Over a bound tree: each adapter's factors and the parameters trained whole. Over plain
        `params`: those trained whole (none, for LoRA without `train`).
        """
        flat = trees.flatten(tree, is_leaf=is_adapted)
        whole = set(self.whole_paths(tree))
        leaves = [
            _adapter_mask(leaf) if is_adapted(leaf) else path in whole
            for path, leaf in flat.items()
        ]
        return flat.unflatten(leaves)

    def table(self, params: PyTree) -> MethodTable:
        """What the method trains in `params`: path, shape, rank, scale, trainable parameters."""
        flat = dict(trees.flatten(params).items())
        whole = self.whole_paths(params)
        rows = self._adapter_rows(params, frozenset(whole))
        rows += [Row(p, tuple(flat[p].shape), None, None, flat[p].size) for p in whole]
        total = sum(leaf.size for leaf in flat.values() if trees.is_array(leaf))
        order = {path: place for place, path in enumerate(flat)}
        return MethodTable(tuple(sorted(rows, key=lambda row: order[row.path])), total)

    def whole_paths(self, params: PyTree) -> list[str]:
        """Paths of the parameters trained whole. Raises `RequestError` if `train` matches none."""
        flat = trees.flatten(params, is_leaf=is_adapted)
        floats = [path for path, leaf in flat.items() if is_adapted(leaf) or trees.is_float(leaf)]
        if not self.train:
            return []
        pattern = pattern_of(self.train, self.aliases)
        whole = [path for path in floats if pattern.fullmatch(path)]
        if not whole:
            raise RequestError(
                f"train={pattern.pattern!r} matches no parameter; "
                f"{trees.nearest(pattern.pattern, floats)}"
            )
        return whole

    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        return {}

    def _bind_adapter(self, path: str, kernel, entry, key):
        raise RequestError(
            f"{type(self).__name__} has no adapters, but `trainable` holds one for {path!r}; "
            "use the method that made it"
        )

    def _adapter_rows(self, params, whole: frozenset[str]) -> list[Row]:
        return []


def _adapter_mask(weight):
    """Booleans in the place of an adapted value's leaves: only the factors train."""
    fields = {
        field.name: None if getattr(weight, field.name) is None else field.name in ("a", "b")
        for field in dataclasses.fields(weight)
        if not field.metadata.get("static")
    }
    return dataclasses.replace(weight, **fields)
