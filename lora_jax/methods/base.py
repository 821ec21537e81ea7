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
import optax

from lora_jax.core import trees
from lora_jax.core.errors import RequestError, not_a_parameter
from lora_jax.core.rules import Aliases, pattern_of
from lora_jax.core.values import is_adapted, is_bound
from lora_jax.methods.contract import Contract
from lora_jax.methods.masked import by_part
from lora_jax.methods.merging import merged
from lora_jax.methods.rows import bind_rows, chosen_rows, init_rows, matching, rows_name
from lora_jax.methods.sites import path_of
from lora_jax.methods.table import MethodTable, Row, in_natural_order

PyTree = Any
Trainable = dict[str, dict[str, jax.Array]]


# How many numbers of each random array `Method.drawn` reports.
PROBED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Contract):
    """What all methods share: parameters trained whole, named by `train`, and rows of tables.

    `train`: a regular expression over whole paths, aliases joined by commas, or a sequence of
    either: a task head, biases, norms. `rows`: `{expression: indices}`, the rows of axis 0 (new
    tokens of an embedding) that train while the others stay. `aliases`: `{name: expression}` of the
    model family. A method is immutable and holds no arrays.
    """

    # Lists and mappings are compared but not hashed, so that every method can be hashed.
    train: str | Sequence[str] = dataclasses.field(default=(), hash=False)
    rows: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict, hash=False)
    aliases: Aliases | None = dataclasses.field(default=None, repr=False, hash=False)

    def init(self, key: jax.Array, params: PyTree) -> tuple[Trainable, PyTree]:
        """Splits the parameters into what trains and what stays frozen.

        Args:
          key: from which random factors are drawn.
          params: the tree of parameters, which is untouched.

        Returns:
          `(trainable, frozen)`: `{path: {"a": …, "b": …}}` for adapters, `{path: {"value": …}}` for
          parameters trained whole (copies, so that they may be donated), `{"path[rows]": {"rows":
          …}}` for rows; and `params` with holes where `trainable` holds the parameter.

        Raises:
          RequestError: a rule, or a part of one, matches nothing, or one array sits at two paths
            (tied) and would be at one of them only what it was.
        """
        whole = self.whole_paths(params)
        values, frozen = trees.take(params, whole)
        trainable = {path: {"value": jnp.array(values[path], copy=True)} for path in whole}
        trainable |= self._init_adapters(key, params, frozenset(whole))
        trainable |= {
            rows_name(path): init_rows(path, leaf, indices)
            for path, (leaf, indices) in self._rows(params, whole).items()
        }
        trees.check_not_untied(params, {path_of(name) for name in trainable})
        return trainable, frozen

    def bind(
        self,
        trainable: Trainable,
        frozen: PyTree,
        *,
        key: jax.Array | None = None,
        training: bool = False,
        data: Mapping[str, Mapping[str, jax.Array]] | None = None,
    ) -> PyTree:
        """The params tree for a lifted model: adapted values sit where arrays sat.

        Args:
          trainable: as `init` gave it, trained or not.
          frozen: what `init` gave, or the full tree: what `trainable` holds wins.
          key: turns adapter dropout on.
          training: if true, a method that has dropout must get a key.
          data: `{name: {"scale": (), "dropout": ()}}` in place of the rules' (sweeps give each cell
            its own).

        Returns:
          The tree of adapted values and arrays.

        Raises:
          RequestError: for a path that the tree lacks, an adapter of other shapes than its rule
            says, or a tree that is bound already: `bind_all` binds several.
        """
        if training and key is None:
            for method in self.members():
                method._check_no_dropout()
        kernels = dict(trees.flatten(frozen, is_leaf=is_adapted).items())
        if bound := [p for p in map(path_of, trainable) if is_bound(kernels.get(p))]:
            raise RequestError(
                f"{bound[0]!r} is bound already; bind the tree that `init` returned, or several "
                "adapters at once with lora_jax.bind_all"
            )
        return self._bind_over(trainable, frozen, key=key, data=data or {}, beneath={})

    def _bind_over(self, trainable, frozen, *, key, data, beneath: dict[str, list[str]]) -> PyTree:
        """`bind`, over the adapters `{path: names}`, to which this one's are added."""
        flat = trees.flatten(frozen, is_leaf=is_adapted)
        kernels = dict(flat.items())
        values: dict[str, Any] = {}
        # Rows come last: they stand for what the adapters beneath leave of them.
        for name in sorted(trainable, key=lambda name: ("rows" in trainable[name], name)):
            entry, path = trainable[name], path_of(name)
            if "value" in entry:
                values[path] = entry["value"]
                continue
            if path not in kernels:
                raise RequestError(
                    f"the adapter of {path!r} has no parameter in this tree; "
                    f"{trees.nearest(path, flat.paths)}"
                )
            kernel = values.get(path, kernels[path])
            if "rows" in entry:
                values[path] = bind_rows(path, kernel, entry["rows"], self.indices_of(path))
            else:
                owner = self.owner_of(name)
                owner._check_beneath(name, beneath.get(path, ()))
                values[path] = owner._bind_adapter(name, kernel, entry, key, data)
            beneath.setdefault(path, []).append(name)
        return trees.put(frozen, values, is_leaf=is_adapted)

    def merge(self, trainable: Trainable, frozen: PyTree, *, dtype: Any = None) -> PyTree:
        """Plain parameters with the adapters folded in (W + ΔW), in the same shapes.

        Source: Hu et al. 2021, §4.1, "no additional inference latency".

        Args:
          trainable: as for `bind`; untouched.
          frozen: likewise.
          dtype: of the adapted and of the quantised parameters (see `merging.merged`); by default
            each kernel's own. A quantised base needs it.

        Returns:
          The tree of plain arrays; the sum is made in float32 or wider and rounded once.

        Raises:
          RequestError: `merging.merged` refuses, or the method adds to the computation and not to a
            parameter (`MERGES`).
        """
        self.check_merges()
        return merged(self.bind(trainable, frozen), dtype)

    def mask(self, tree: PyTree) -> PyTree:
        """A tree of booleans, True exactly on the leaves that train.

        Over a bound tree: each adapter's factors and the parameters trained whole. Over plain
        `params`: those trained whole (none, for LoRA without `train`). Raises `RequestError` for a
        bound tree of a method whose bound values are computed from what trains, or whose parts have
        rates of their own, which a mask cannot say.
        """
        flat = trees.flatten(tree, is_leaf=is_adapted)
        if any(is_bound(leaf) for leaf in flat.leaves):
            for method in self.members():
                method._check_maskable(tree)
        whole = set(self.whole_paths(tree))

        def trains(path, leaf):
            if is_bound(leaf):
                return self.owner_of(path)._mask_of(path, leaf)
            is_stored = isinstance(leaf, trees.Stored)
            return jax.tree.map(lambda _: False, leaf) if is_stored else path in whole

        return flat.unflatten([trains(*item) for item in flat.items()])

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """`tx` with this method's learning rates and weight decays of parts.

        Frozen parts get no optimizer state, no decay, and stay bit for bit as they are. For most
        methods it is `tx` itself.
        """
        has_own = any(
            method.FROZEN_PARTS or method.rate_multipliers or method.DECAY_MULTIPLIERS
            for method in self.members()
        )
        return by_part(tx, self.rate_of, self.decay_of) if has_own else tx

    def drawn(self, trainable: Trainable) -> dict[str, list[float]]:
        """A sample of each random array that binding draws again: `{name: numbers}`.

        An adapter's file keeps it, so that a JAX that draws other numbers is noticed on reading.
        """
        return {}

    def owns(self, name: str) -> bool:
        """Whether an adapter of this name (see `table`) is this method's."""
        return False

    def owner_of(self, name: str) -> Method:
        """The method that an adapter belongs to; of several that were combined, one."""
        return self

    def roles_of(self, name: str, part: str) -> str | None:
        """The roles of a part's axes (see `PARTS`); None for a part that has none."""
        return self.owner_of(name).PARTS.get(part)

    def rate_of(self, name: str, part: str) -> float:
        """The factor on the learning rate of one part of one adapter: 0 where it is frozen."""
        owner = self.owner_of(name)
        return 0.0 if part in owner.FROZEN_PARTS else owner.rate_multipliers.get(part, 1.0)

    def decay_of(self, name: str, part: str) -> float:
        """The factor on the weight decay of one part of one adapter."""
        return self.owner_of(name).DECAY_MULTIPLIERS.get(part, 1.0)

    @property
    def rate_multipliers(self) -> Mapping[str, float]:
        """`{part: factor}` on the learning rate, where it is not 1."""
        return self.RATE_MULTIPLIERS

    def check_merges(self) -> None:
        """Raises `RequestError` for a method whose adapters are no change of a parameter."""
        for method in self.members():
            if not method.MERGES:
                raise not_a_parameter(method.TITLE)

    def table(self, params: PyTree) -> MethodTable:
        """What the method trains in `params`: path, shape, rank, scale, trainable parameters."""
        flat = dict(trees.flatten(params).items())
        whole = self.whole_paths(params)
        members, taken = self.members(), frozenset(whole)
        rows = [row for method in members for row in method._adapter_rows(params, taken)]
        skipped = dict.fromkeys(p for method in members for p in method._skipped(params, taken))
        rows += [Row(p, tuple(flat[p].shape), None, None, flat[p].size) for p in whole]
        for path, (leaf, indices) in self._rows(params, whole).items():
            shape = (len(indices), *leaf.shape[1:])
            size = leaf.size // leaf.shape[0] * len(indices)
            rows.append(Row(rows_name(path), shape, None, None, size))
        total = sum(leaf.size for leaf in flat.values() if trees.is_array(leaf))
        order = {path: place for place, path in enumerate(in_natural_order(flat))}
        in_order = sorted(rows, key=lambda row: (order[path_of(row.path)], row.path))
        return MethodTable(tuple(in_order), total, tuple(skipped))

    def whole_paths(self, params: PyTree) -> list[str]:
        """Paths of the parameters trained whole. Raises `RequestError` for what matches none."""
        return matching("train", self.train, params, self.aliases) if self.train else []

    def _rows(self, params: PyTree, whole=()) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """`{path: (parameter, indices)}` of the rows that train."""
        found = (chosen_rows(m.rows, params, whole, m.aliases) for m in self.members())
        return {path: rows for of_member in found for path, rows in of_member.items()}

    def indices_of(self, path: str) -> tuple[int, ...]:
        """The rows of the parameter at `path` that train. Raises `RequestError` for none."""
        for method in self.members():
            for pattern, indices in method.rows.items():
                if pattern_of(pattern, method.aliases).fullmatch(path):
                    return tuple(int(n) for n in indices)
        raise RequestError(f"no rows= of this method names {path!r}; use its own method")

    def members(self) -> tuple[Method, ...]:
        """The methods that this one consists of."""
        return (self,)

    def _check_beneath(self, name: str, beneath: Sequence[str]) -> None:
        """Raises `RequestError` if this adapter cannot sit on those bound before at its path."""

    def _check_maskable(self, tree: PyTree) -> None:
        """Raises `RequestError` if no mask over the bound tree says how this method trains."""
        kind = type(self).__name__
        if self.rows:
            raise RequestError(
                f"rows={dict(self.rows)!r} are bound as a change of their table, so no leaf of the "
                "bound tree trains them; split with init and differentiate `trainable`"
            )
        for what, own in (
            ("learning rates", self.rate_multipliers), ("weight decays", self.DECAY_MULTIPLIERS)
        ):  # fmt: skip
            if own:
                factors = ", ".join(f"{part} {factor:g}" for part, factor in own.items())
                raise RequestError(
                    f"{kind} has {what} of its own for some parts ({factors} times), which a mask "
                    "cannot say; split with init and use method.optimizer(tx) on `trainable`"
                )

    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        return {}

    def _bind_adapter(self, name: str, kernel, parts, key, data):
        raise RequestError(
            f"{type(self).__name__} has no adapters, but `trainable` holds one for {name!r}; "
            "use the method that made it"
        )

    def _adapter_rows(self, params, whole: frozenset[str]) -> list[Row]:
        return []

    def _skipped(self, params, whole: frozenset[str]) -> list[str]:
        """What the rules match and `axes` does not name: it meets no product."""
        return []

    def _mask_of(self, path: str, value) -> Any:
        raise RequestError(
            f"what {type(self).__name__} binds at {path!r} is computed from what trains, so no "
            "leaf of it trains itself; split with init and differentiate `trainable`"
        )

    def _check_no_dropout(self) -> None:
        """Raises `RequestError` if this method drops anything in training."""
