"""LoRA: a frozen kernel and a trained low-rank update (Hu et al. 2021, arXiv:2106.09685).

Variants are subclasses in files of their own; `methods/README.md` walks through adding one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.apply import scale_of
from lora_jax.core.axes import KernelAxes, roles_of_axes
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Aliases, Rule, match_rules, split_parts
from lora_jax.core.values import AdaptedValue, is_adapted, is_bound
from lora_jax.core.weights import LoRAWeight
from lora_jax.methods.base import Method, Trainable
from lora_jax.methods.sites import Site, can_hold, name_of, path_of
from lora_jax.methods.starts import draw, key_of_name
from lora_jax.methods.table import Row


class LoRASettings(TypedDict, total=False):
    """The keyword arguments of `LoRA`, for variants whose `__init__` has more."""

    targets: str | Sequence[str] | None
    rank: int | None
    alpha: float | None
    dropout: float | None
    init: str | None
    layers: Sequence[int] | None
    exclude: str | Sequence[str] | None
    slice: tuple[int, int, int] | None
    rules: Sequence[Rule] | None
    axes: Mapping[str, KernelAxes] | None
    train: str | Sequence[str]
    rows: Mapping[str, Sequence[int]] | None
    aliases: Aliases | None


@dataclasses.dataclass(frozen=True, init=False, kw_only=True)
class LoRA(Method):
    """ΔW = (alpha / rank) · a @ b on every kernel that a rule matches; the kernel stays frozen.

    Either `targets` with `rank`, `alpha`, `dropout`, `init`, … (see `Rule`), or `rules`: an ordered
    sequence of `Rule`, first match wins. `train` and `rows` name what else trains (see `Method`);
    a parameter trained whole gets no adapter. `axes` is what `kernel_axes` gave: what it
    does not name meets no product and gets no adapter; without it a kernel of two axes is (in, out)
    and one of more is an error.

    `a` is (stack…, in…, r), `b` is (stack…, r, out…), in float32 or the kernel's dtype if wider.

    >>> params = {"kernel": jnp.ones((6, 4))}
    >>> method = LoRA(targets="kernel", rank=2, alpha=4)
    >>> trainable, frozen = method.init(jax.random.key(0), params)
    >>> {name: factor.shape for name, factor in trainable["kernel"].items()}
    {'a': (6, 2), 'b': (2, 4)}
    """

    rules: tuple[Rule, ...] = dataclasses.field(default=(), metadata={"help": "several rules"})
    axes: Mapping[str, KernelAxes] | None = dataclasses.field(default=None, repr=False, hash=False)

    TITLE: ClassVar = "LoRA"
    PARTS: ClassVar = {"a": "sir", "b": "sro"}
    ZERO_PADDABLE: ClassVar = frozenset({"ranks", "targets"})
    EXTENDS_INIT: ClassVar = True

    def __init__(
        self,
        *,
        targets: str | Sequence[str] | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        init: str | None = None,
        layers: Sequence[int] | None = None,
        exclude: str | Sequence[str] | None = None,
        slice: tuple[int, int, int] | None = None,
        rules: Sequence[Rule] | None = None,
        axes: Mapping[str, KernelAxes] | None = None,
        train: str | Sequence[str] = (),
        rows: Mapping[str, Sequence[int]] | None = None,
        aliases: Aliases | None = None,
    ):
        of_rule = {
            "rank": rank, "alpha": alpha, "dropout": dropout, "init": init, "layers": layers,
            "exclude": exclude, "slice": slice,
        }  # fmt: skip
        given = {name: value for name, value in of_rule.items() if value is not None}
        super().__init__(train=train, rows=dict(rows or {}), aliases=aliases)
        rules = self._checked_rules(targets, rules, given)
        object.__setattr__(self, "rules", tuple(split_parts(rules, aliases)))
        object.__setattr__(self, "axes", axes)

    def _checked_rules(self, targets, rules, given: Mapping[str, Any]) -> list[Rule]:
        """One rule of `targets` and the settings `given` for it, or `rules` as they are."""
        name = type(self).__name__
        if useless := [key for key in given if key in self.UNSUPPORTED_SETTINGS]:
            why = self.UNSUPPORTED_SETTINGS[useless[0]]
            raise RequestError(f"{name} has no {useless[0]}: {why}")
        if (targets is None) == (rules is None):
            raise RequestError(f"{name} takes either targets=… (one rule) or rules=[Rule(…), …]")
        if rules is None:
            return [Rule(targets, **given)]
        if given:
            raise RequestError(f"{next(iter(given))!r} belongs into each Rule when rules= is used")
        if not rules:
            raise RequestError("rules is empty; name at least one target, or use HeadOnly")
        if others := [rule for rule in rules if not isinstance(rule, Rule)]:
            raise RequestError(
                f"rules holds {others[0]!r}; each must be a lora_jax.Rule, such as "
                "Rule('.*/query/kernel', rank=4)"
            )
        return list(rules)

    # What a variant changes.

    def scale(self, rule: Rule) -> float:
        """The factor before a @ b."""
        return scale_of(rule.alpha, rule.rank)

    def init_parts(self, key: jax.Array, kernel: jax.Array, site: Site) -> dict[str, jax.Array]:
        """The arrays of PARTS at the start; `kernel` is the part of the parameter that is adapted.

        Leaves that the kernel does not decide are drawn from `key`.
        """
        dtype = float32_or_wider(kernel.dtype)
        b = jnp.zeros(site.part_shape("sro"), dtype)
        return {"a": draw(key, site.rule.init, site, dtype), "b": b}

    def factors(self, parts: Mapping[str, jax.Array], site: Site) -> tuple[jax.Array, jax.Array]:
        """`a (stack…, in…, k)` and `b (stack…, k, out…)` of ΔW = scale · a @ b, any k."""
        return parts["a"], parts["b"]

    def weight(self, low_rank: LoRAWeight, parts, site: Site) -> AdaptedValue:
        """What is bound in the kernel's place, from the low-rank sum."""
        return low_rank

    # What all of them share.

    def sites(self, params, whole: frozenset[str] | None = None) -> dict[str, Site]:
        """`{name: site}` of every adapter, in the tree's order.

        `whole` are the paths of what trains whole; by default those of this method. Raises
        `RequestError` for a rule that matches nothing, a rank above the matrix, a slice outside of
        it, or a kernel of more than two axes without `axes`.
        """
        whole = frozenset(self.whole_paths(params)) if whole is None else whole
        leaves = dict(trees.flatten(params).items())
        able = [path for path, leaf in leaves.items() if can_hold(leaf) and path not in whole]
        candidates = [path for path in able if self.axes is None or path in self.axes]
        for path in self.axes or ():
            if path not in leaves:
                raise RequestError(
                    f"axes= names {path!r}, which is no parameter; {trees.nearest(path, leaves)}"
                )
        everything = [path for path, leaf in leaves.items() if trees.is_array(leaf)]
        found = {}
        for path, rule in match_rules(self.rules, candidates, everything, self.aliases):
            site = self._site(path, rule, leaves[path].shape)
            site.check(any_rank=self.ANY_RANK)
            found[site.name] = site
        return found

    def _skipped(self, params, whole: frozenset[str]) -> list[str]:
        if self.axes is None:
            return []
        return [
            path
            for path, leaf in trees.flatten(params).items()
            if can_hold(leaf) and path not in whole and path not in self.axes
            and any(rule.takes(path, self.aliases) for rule in self.rules)
        ]  # fmt: skip

    def _site(self, path: str, rule: Rule, shape) -> Site:
        return Site(path, rule, roles_of_axes(self.axes, path, len(shape)), tuple(shape))

    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        leaves = dict(trees.flatten(params).items())
        return {
            name: self.init_parts(
                key_of_name(key, name), self._start(leaves[site.path], site), site
            )
            for name, site in self.sites(params, whole).items()
        }

    def _start(self, kernel, site: Site) -> Any:
        """What `init_parts` sees of the kernel: the part that is adapted."""
        if isinstance(kernel, trees.Stored):
            if not self.FROM_KERNEL:
                return jax.ShapeDtypeStruct(site.shape, kernel.dtype)
            kernel = kernel.dequantize()
        return site.cut(kernel)

    def _bind_adapter(self, name, kernel, parts, key, data):
        base = kernel.base if is_adapted(kernel) else kernel
        site = self.site_of(name, base.shape)
        self._check_parts(name, parts, site)
        # No gradient of what is fixed is computed.
        fixed = {part: jax.lax.stop_gradient(parts[part]) for part in self.FROZEN_PARTS}
        parts = {**parts, **fixed}
        a, b = site.checked_factors(type(self).__name__, *self.factors(parts, site))
        stack, dtype = site.sizes("s"), jnp.result_type(a)
        key = None if key is None or not site.rule.dropout else key_of_name(key, name)
        if key is not None and stack:
            key = jax.random.split(key, stack)
        own = data.get(name, {"scale": self.scale(site.rule), "dropout": site.rule.dropout})

        def of_stack(value):
            # NumPy where it can be: a constant that needs no program of its own.
            full = np.full if isinstance(value, float) else jnp.full
            return full(stack, value, dtype)

        low_rank = LoRAWeight(
            kernel=kernel,
            a=site.widen(a, "sir"),
            b=site.widen(b, "sro"),
            scale=of_stack(own["scale"]),
            key=key,
            dropout=None if key is None else of_stack(own["dropout"]),
            roles=site.roles,
            path=site.path,
        )
        return self.weight(low_rank, parts, site)

    def owns(self, name: str) -> bool:
        return self._rule_for(name) is not None

    def _rule_for(self, name: str) -> Rule | None:
        path = path_of(name)
        for rule in self.rules:
            if name_of(path, rule.slice) == name and rule.takes(path, self.aliases):
                return rule
        return None

    def site_of(self, name: str, shape: Sequence[int]) -> Site:
        """The site of the adapter of this name, on a kernel of this shape. Raises `RequestError`
        where no rule matches."""
        rule = self._rule_for(name)
        if rule is None:
            raise RequestError(
                f"no rule of this method matches the adapter {name!r}; use its own method"
            )
        return self._site(path_of(name), rule, shape)

    def _check_parts(self, name: str, parts, site: Site) -> None:
        if parts.keys() != self.PARTS.keys():
            raise RequestError(
                f"the adapter of {name!r} holds {sorted(parts)}, but {type(self).__name__} has "
                f"{sorted(self.PARTS)}; use the method that made it"
            )
        stack = site.sizes("s")
        for part, spec in self.PARTS.items():
            wanted, found = site.part_shape(spec), tuple(parts[part].shape)
            if wanted == found:
                continue
            if "s" in spec and found[: len(stack)] != stack:
                raise RequestError(
                    f"the adapter of {name!r} is for {found[: len(stack)]} stacked matrices "
                    f"(experts, layers), the kernel {site.kernel_shape} has {stack}; load the "
                    "model it was made for"
                )
            raise RequestError(
                f"{part} of the adapter of {name!r} is {found}, but rank {site.rank} on "
                f"{site.shape} needs {wanted}; use the method that made it"
            )

    def _adapter_rows(self, params, whole: frozenset[str]) -> list[Row]:
        rows = []
        trained = [spec for part, spec in self.PARTS.items() if part not in self.FROZEN_PARTS]
        for name, site in self.sites(params, whole).items():
            count = sum(math.prod(site.part_shape(spec)) for spec in trained)
            rows.append(Row(name, site.shape, site.rank, self.scale(site.rule), count))
        return rows

    def _mask_of(self, path: str, value):
        plain = LoRA.factors is type(self).factors and LoRA.weight is type(self).weight
        sliced = any(rule.slice and rule.takes(path, self.aliases) for rule in self.rules)
        if not plain or sliced or type(value) is not LoRAWeight or is_bound(value.kernel):
            return super()._mask_of(path, value)
        trains = {name: name not in self.FROZEN_PARTS for name in self.PARTS}
        return dataclasses.replace(jax.tree.map(lambda _: False, value), **trains)

    def _check_no_dropout(self) -> None:
        dropping = [rule for rule in self.rules if rule.dropout]
        if dropping:
            raise RequestError(
                f"rule {dropping[0].targets!r} has dropout={dropping[0].dropout} and no key was "
                "given to draw it from; pass key=jax.random.fold_in(key, step) to bind"
            )
