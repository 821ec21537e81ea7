"""What adapters change in their base, each times a weight, added up.

Low-rank parts are gathered side by side; whole parameters and rows are added in float32 or wider
and rounded once. Used by `methods/arithmetic.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.weights import LoRAWeight
from lora_jax.methods.base import Method
from lora_jax.methods.lora import LoRA
from lora_jax.methods.sites import Site, are_apart, path_of


@dataclasses.dataclass(frozen=True)
class LowRank:
    """weight · ΔW of one adapter at one site, as `a @ b`."""

    site: Site
    a: Any
    b: Any

    def widened(self) -> LowRank:
        """The same as an adapter of the whole kernel: zeros outside of the slice."""
        rule = dataclasses.replace(self.site.rule, slice=None)
        site = dataclasses.replace(self.site, rule=rule)
        return LowRank(site, self.site.widen(self.a, "sir"), self.site.widen(self.b, "sro"))

    def delta(self, kernel) -> Any:
        """a @ b in the whole kernel's shape, float32 or wider."""
        whole = self.widened()
        ones = jnp.ones(whole.site.sizes("s"), whole.a.dtype)
        return LoRAWeight(
            kernel=kernel, a=whole.a, b=whole.b, scale=ones, roles=whole.site.roles,
            path=whole.site.path,
        ).delta()  # fmt: skip


class Changes:
    """The changes of several adapters to `base`, `{path: array}`.

    `whole` holds `{path: [(weight, value)]}`, `rows` `{path: [(weight, indices, values)]}`,
    `low_rank` `{name: [LowRank]}`; `settle` brings together what meets on one parameter.
    """

    def __init__(self, base: Mapping[str, Any]):
        self.base = base
        self.whole: dict[str, list[tuple[float, Any]]] = defaultdict(list)
        self.rows: dict[str, list[tuple[float, tuple[int, ...], Any]]] = defaultdict(list)
        self.low_rank: dict[str, list[LowRank]] = defaultdict(list)
        self._beside: dict[str, list[Any]] = defaultdict(list)  # further changes, on `whole`

    def add(self, method: Method, name: str, entry: Mapping[str, Any], weight: float) -> None:
        """Raises `RequestError` for a method whose change is not low-rank."""
        path = path_of(name)
        if "value" in entry:
            self.whole[path].append((weight, entry["value"]))
        elif "rows" in entry:
            self.rows[path].append((weight, method.indices_of(path), entry["rows"]))
        else:
            self.low_rank[name].append(self._low_rank_of(method, name, entry, weight))

    def _low_rank_of(self, method: Method, name: str, entry, weight: float) -> LowRank:
        method = method.owner_of(name)
        method.check_merges()
        if not isinstance(method, LoRA) or type(method).weight is not LoRA.weight:
            raise RequestError(
                f"the change that {type(method).__name__} makes to {name!r} is not low-rank, so it "
                "has no weighted sum; merge it, and take `difference` of the merged model and the "
                "base"
            )
        site = method.site_of(name, self.base[path_of(name)].shape)
        a, b = method.factors(entry, site)
        return LowRank(site, a, b * jnp.asarray(weight * method.scale(site.rule), b.dtype))

    def settle(self) -> None:
        """What one adapter trains whole takes what the others change in it; slices that overlap
        others, or meet a whole kernel, become whole kernels.

        Raises `RequestError` where adapters see the axes of one kernel differently.
        """
        of_path = defaultdict(list)
        for name in self.low_rank:
            of_path[path_of(name)].append(name)
        for path, names in of_path.items():
            parts = [part for name in names for part in self.low_rank[name]]
            if len({part.site.roles for part in parts}) > 1:
                raise RequestError(
                    f"the adapters see the axes of {path!r} differently; use one view (axes=)"
                )
            apart = all(are_apart(*pair) for pair in itertools.combinations(names, 2))
            if path not in self.whole and apart:
                continue
            for name in names:
                del self.low_rank[name]
            if path in self.whole:
                self._beside[path] += [part.delta(self.base[path]) for part in parts]
            else:
                self.low_rank[path] = [part.widened() for part in parts]
        for path in [path for path in self.rows if path in self.whole]:
            indices, change = self._change_of_rows(path, self.rows.pop(path))
            table = jnp.zeros(self.base[path].shape, change.dtype)
            self._beside[path].append(table.at[jnp.asarray(indices)].set(change))

    def _change_of_rows(self, path: str, found) -> tuple[tuple[int, ...], Any]:
        """The rows that any adapter trains, in the order of their appearance, and their change."""
        indices = tuple(dict.fromkeys(n for _, own, _ in found for n in own))
        place = {n: k for k, n in enumerate(indices)}
        total = 0.0
        for weight, own, rows in found:
            change = _change(weight, rows, self._start(path, own))
            at = jnp.asarray([place[n] for n in own])
            total += jnp.zeros((len(indices), *change.shape[1:]), change.dtype).at[at].set(change)
        return indices, total

    def _start(self, path: str, indices) -> Any:
        return jnp.asarray(self.base[path])[jnp.asarray(indices)]

    def value(self, path: str) -> Any:
        """The parameter at `path` as the sum has it, of those in `whole`."""
        found, beside = self.whole[path], self._beside[path]
        if len(found) == 1 and found[0][0] == 1.0 and not beside:
            return found[0][1]  # bit for bit; base + (value - base) would not be
        total: Any = sum(beside) + sum(_change(*one, self.base[path]) for one in found)
        dtype = jnp.result_type(*(value for _, value in found))
        return (self.base[path].astype(total.dtype) + total).astype(dtype)

    def rows_of(self, path: str) -> tuple[tuple[int, ...], Any]:
        """`(indices, values)` of the rows of `path` that any adapter trains."""
        found = self.rows[path]
        if len(found) == 1 and found[0][0] == 1.0:
            return found[0][1:]
        indices, change = self._change_of_rows(path, found)
        return indices, self._start(path, indices).astype(change.dtype) + change


def side_by_side(parts: list[LowRank]) -> LowRank:
    """The sum of ΔWs of one site, exactly: a's columns and b's rows next to each other."""
    rank_axis = len(parts[0].site.sizes("s"))
    a = jnp.concatenate([part.a for part in parts], axis=-1)
    b = jnp.concatenate([part.b for part in parts], axis=rank_axis)
    return LowRank(parts[0].site, a, b)


def _change(weight: float, value, start):
    """weight · (value − start), in float32 or wider."""
    wide = float32_or_wider(jnp.result_type(value))
    return jnp.asarray(weight, wide) * (jnp.asarray(value, wide) - jnp.asarray(start, wide))
