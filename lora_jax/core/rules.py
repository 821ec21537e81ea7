"""Rules: which parameters are adapted and how, by regular expressions over their paths."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from lora_jax.core import trees
from lora_jax.core.arguments import NamedSettings, checked_names
from lora_jax.core.errors import RequestError
from lora_jax.core.patterns import Aliases as Aliases
from lora_jax.core.patterns import Part as Part
from lora_jax.core.patterns import check_each_matches as check_each_matches
from lora_jax.core.patterns import match_with as match_with
from lora_jax.core.patterns import names_in, near_paths
from lora_jax.core.patterns import pattern_of as pattern_of

INITS = ("kaiming_uniform", "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Rule(NamedSettings):
    """One line of a method: every parameter that `targets` matches gets this adapter.

    `targets`: a regular expression matched against the whole path; or aliases of a model family
    joined by commas ("q,v"); or a sequence of either. `exclude`: the same, for paths to leave out.
    `layers`: layer indices, the first whole number among a path's keys (not within one: Flax
    Linen's `layers_0`, and layers stacked in one kernel, have none); None for all. `slice`:
    (axis, start, stop), the part of the kernel that is adapted, the axis counted from the end: q of
    a fused (in, 3 * width) kernel is (-1, 0, width). Rules may take different slices of one kernel.

    `rank` ≥ 1; `alpha` > 0 (LoRA's scale is alpha / rank); `dropout` in [0, 1) on the adapter's
    input; `init` names how `a` starts: "kaiming_uniform", U(±1/√in), as the paper's code has it
    (Kaiming with a = √5); "gaussian", N(0, 1/in), the paper's text, which leaves σ open; or
    "orthogonal", orthonormal columns. `b` starts at zero. `any_rank` allows a rank above the
    matrix's own, which adapters of others have. Raises `RequestError` for values outside.
    """

    targets: str | Sequence[str] = field(metadata={"help": "kernels to adapt", "role": "lane"})
    rank: int = field(default=8, metadata={"help": "columns of A, rows of B", "role": "lane"})
    alpha: float = field(default=8.0, metadata={"help": "scale = alpha / rank", "role": "lane"})
    dropout: float = field(default=0.0, metadata={"help": "rate on A's input", "role": "lane"})
    init: str = field(default="kaiming_uniform", metadata={"help": "how A starts", "role": "lane"})
    layers: Sequence[int] | None = field(default=None, metadata={"help": "layers to adapt"})
    exclude: str | Sequence[str] = field(default=(), metadata={"help": "kernels to leave out"})
    slice: tuple[int, int, int] | None = field(default=None, metadata={"help": "part of a kernel"})
    any_rank: bool = False

    def __post_init__(self):
        for name in ("targets", "exclude"):
            object.__setattr__(self, name, checked_names(name, getattr(self, name)))
        rank = _whole(self.rank)
        if rank is None or rank < 1:
            raise RequestError(f"rank is {self.rank!r}; it must be a whole number of 1 or more")
        object.__setattr__(self, "rank", rank)
        if not (_is_number(self.alpha) and self.alpha > 0):
            raise RequestError(f"alpha is {self.alpha!r}; it must be a positive number")
        if not (_is_number(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise RequestError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if self.init not in INITS:
            raise RequestError(f"init is {self.init!r}; {trees.nearest(self.init, INITS)}")
        if self.layers is not None:
            one = isinstance(self.layers, str) or not isinstance(self.layers, Iterable)
            layers = tuple(_whole(n) for n in ([self.layers] if one else self.layers))
            if not layers or any(n is None or n < 0 for n in layers):
                raise RequestError(f"layers is {self.layers!r}; it must be whole numbers from 0 on")
            object.__setattr__(self, "layers", layers)
        if self.slice is not None:
            self._check_slice()

    def _check_slice(self):
        given: Any = self.slice
        try:
            axis, start, stop = (operator.index(n) for n in given)
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"slice is {self.slice!r}; it must be (axis, start, stop), as (-1, 0, 768)"
            ) from error
        if axis >= 0 or not 0 <= start < stop:
            raise RequestError(
                f"slice is {self.slice!r}; the axis counts from the end (-1 is the last), and "
                "0 <= start < stop"
            )
        object.__setattr__(self, "slice", (axis, start, stop))

    def takes(self, path: str, aliases: Aliases | None = None) -> bool:
        """Whether this rule is for the parameter at `path`."""
        if not pattern_of(self.targets, aliases).fullmatch(path):
            return False
        if self.exclude and pattern_of(self.exclude, aliases).fullmatch(path):
            return False
        return self.layers is None or layer_of(path) in self.layers


def split_parts(rules: Sequence[Rule], aliases: Aliases | None) -> list[Rule]:
    """The rules with each alias that stands for a `Part` in a rule of its own, its slice set.

    Raises `RequestError` where such an alias meets a slice of the rule's own, or is excluded.

    >>> parts = {"q": Part(".*/qkv", (-1, 0, 4)), "o": ".*/o"}
    >>> [(rule.targets, rule.slice) for rule in split_parts([Rule("q,o")], parts)]
    [('o', None), ('.*/qkv', (-1, 0, 4))]
    """
    parts = {name: value for name, value in (aliases or {}).items() if isinstance(value, Part)}
    found: list[Rule] = []
    for rule in rules:
        names = [own for _, own in names_in(rule.targets)]
        mine = [name for group in names for name in group if name in parts]
        if not mine:
            found.append(rule)
            continue
        if rule.slice:
            raise RequestError(
                f"target {mine[0]!r} is itself the slice {parts[mine[0]].slice} of a fused kernel; "
                f"leave out slice={rule.slice}, or name the kernel ({parts[mine[0]].pattern!r})"
            )
        rest = [",".join(name for name in group if name not in parts) for group in names]
        rest = [target for target in rest if target]
        if rest:
            targets = rest[0] if len(rest) == 1 else tuple(rest)
            found.append(dataclasses.replace(rule, targets=targets))
        found += [
            dataclasses.replace(rule, targets=parts[name].pattern, slice=parts[name].slice)
            for name in dict.fromkeys(mine)
        ]
    return found


def _whole(value: Any) -> int | None:
    """A whole number of any kind (NumPy's, too) as Python's; None for what is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def layer_of(path: str) -> int | None:
    """The first key of a path that is a whole number.

    >>> layer_of("encoder/layers/3/attention/query/kernel")
    3
    """
    return next((int(key) for key in path.split("/") if key.isdecimal()), None)


def match_rules(
    rules: Sequence[Rule],
    candidates: Sequence[str],
    everything: Sequence[str],
    aliases: Aliases | None = None,
) -> list[tuple[str, Rule]]:
    """`(path, rule)` for each path that can be adapted, in their order: the first rule that takes
    it, and where that takes a slice, further rules with other slices of the same axis.

    Raises `RequestError` for a rule, or a part of one (a member of `targets` or `exclude`, one of
    its `layers`), that matches nothing, with the nearest paths, and for slices that overlap.
    """
    assigned: list[tuple[str, Rule]] = []
    for path in candidates:
        mine: list[Rule] = []
        for rule in rules:
            if not rule.takes(path, aliases) or (mine and not (rule.slice and mine[0].slice)):
                continue
            if met := [own.slice for own in mine if not are_disjoint(own.slice, rule.slice)]:
                raise RequestError(
                    f"slices {met[0]} and {rule.slice} of {path!r} overlap; let each rule take a "
                    "part of its own of one axis"
                )
            mine.append(rule)
        assigned += [(path, rule) for rule in mine]
    used = {id(rule) for _, rule in assigned}
    for rule in rules:
        if id(rule) not in used:
            raise RequestError(_why_unused(rule, candidates, everything, aliases))
        check_each_matches("targets", rule.targets, everything, aliases)
        if rule.exclude:
            check_each_matches("exclude", rule.exclude, everything, aliases)
        if rule.layers is not None:
            pattern = pattern_of(rule.targets, aliases)
            there = _layers_of([path for path in candidates if pattern.fullmatch(path)])
            if lost := [layer for layer in rule.layers if layer not in there]:
                raise RequestError(
                    f"layers={rule.layers} of rule {pattern.pattern!r}: there is no layer "
                    f"{lost[0]}; the layers there are {there}"
                )
    return assigned


def are_disjoint(one: tuple[int, int, int] | None, two: tuple[int, int, int] | None) -> bool:
    """Whether two slices `(axis, start, stop)`, None for the whole, are disjoint parts of one
    axis."""
    if one is None or two is None or one[0] != two[0]:
        return False
    return one[2] <= two[1] or two[2] <= one[1]


def _layers_of(paths: Sequence[str]) -> list[int]:
    return sorted({n for path in paths if (n := layer_of(path)) is not None})


def _why_unused(rule: Rule, candidates, everything, aliases) -> str:
    pattern = pattern_of(rule.targets, aliases)
    matched = [path for path in everything if pattern.fullmatch(path)]
    if not matched:
        near = near_paths(pattern.pattern, candidates, aliases)
        return f"rule {pattern.pattern!r} matches no parameter; {near}"
    near = trees.nearest(pattern.pattern, candidates)
    able = [path for path in candidates if pattern.fullmatch(path)]
    if not able:
        return (
            f"rule {pattern.pattern!r} matches only what cannot hold an adapter ({matched[0]!r}, "
            "…): parameters of fewer than two axes, of integers or complex numbers, trained whole, "
            f"or in no product of the model (axes= does not name them); {near}"
        )
    if not any(rule.takes(path, aliases) for path in able):
        found = _layers_of(able)
        there = (
            f"the layers there are {found}"
            if found
            else "no key of its path is a whole number (layers stacked in one kernel, or named "
            "`layers_0`, are chosen by targets=, not by layers=)"
        )
        return (
            f"rule {pattern.pattern!r} matches {able[0]!r}, …, but layers={rule.layers} and "
            f"exclude={rule.exclude!r} leave none of it; {there}"
        )
    return (
        f"rule {pattern.pattern!r} comes too late: earlier rules take every parameter it "
        f"matches ({able[0]!r}, …); move it up or remove it"
    )
