"""Rules: which parameters are adapted and how, by regular expressions over their paths."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from lora_jax.core import trees
from lora_jax.core.errors import RequestError

INITS = ("kaiming_uniform", "gaussian")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a method: every parameter that `targets` matches gets this adapter.

    `targets`: a regular expression matched against the whole path; or aliases of a model family
    joined by commas ("q,v"); or a sequence of either. `rank` ≥ 1; `alpha` > 0 (the scale is
    alpha / rank); `dropout` in [0, 1) on the adapter's input; `init` names how `a` starts:
    "kaiming_uniform", U(±1/√in), as the paper's code has it, or "gaussian", N(0, 1/in), the paper's
    text, which leaves σ open. `b` starts at zero.
    Raises `RequestError` for values outside these.
    """

    targets: str | Sequence[str]
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    init: str = "kaiming_uniform"

    def __post_init__(self):
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise RequestError(f"rank is {self.rank!r}; it must be a whole number of 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise RequestError(f"alpha is {self.alpha!r}; it must be a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise RequestError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if self.init not in INITS:
            raise RequestError(f"init is {self.init!r}; {trees.nearest(self.init, INITS)}")


def pattern_of(
    targets: str | Sequence[str], aliases: Mapping[str, str] | None = None
) -> re.Pattern[str]:
    """The compiled expression of a target: aliases resolved, alternatives joined.

    Raises `RequestError` for an expression that does not compile.

    >>> pattern_of("q,v", {"q": ".*/query/kernel", "v": ".*/value/kernel"}).pattern
    '(?:.*/query/kernel)|(?:.*/value/kernel)'
    """
    aliases = aliases or {}
    parts: list[str] = []
    for target in (targets,) if isinstance(targets, str) else targets:
        names = [name.strip() for name in target.split(",")]
        known = [name for name in names if name in aliases]
        if known and len(known) < len(names):
            unknown = next(name for name in names if name not in aliases)
            raise RequestError(
                f"target {unknown!r} in {target!r} is no alias of this model; "
                f"{trees.nearest(unknown, aliases)}"
            )
        parts.extend(aliases[name] for name in names) if known else parts.append(target)
    joined = parts[0] if len(parts) == 1 else "|".join(f"(?:{part})" for part in parts)
    try:
        return re.compile(joined)
    except re.error as error:
        raise RequestError(
            f"targets {joined!r} is not a regular expression: {error}; "
            "escape special characters with a backslash"
        ) from error


def match_rules(
    patterns: Sequence[re.Pattern[str]], candidates: Sequence[str], everything: Sequence[str]
) -> dict[str, int]:
    """`{path: index of the first pattern that matches it}` over the paths that can be adapted.

    Raises `RequestError` for a pattern that takes none: it lists the nearest paths.
    """
    assigned: dict[str, int] = {}
    for path in candidates:
        for index, pattern in enumerate(patterns):
            if pattern.fullmatch(path):
                assigned[path] = index
                break
    for index, pattern in enumerate(patterns):
        if index in assigned.values():
            continue
        matched = [path for path in everything if pattern.fullmatch(path)]
        if not matched:
            raise RequestError(
                f"rule {pattern.pattern!r} matches no parameter; "
                f"{trees.nearest(pattern.pattern, candidates)}"
            )
        if set(matched) & set(candidates):
            raise RequestError(
                f"rule {pattern.pattern!r} comes too late: earlier rules take every parameter it "
                f"matches ({matched[0]!r}, …); move it up or remove it"
            )
        raise RequestError(
            f"rule {pattern.pattern!r} matches only what cannot hold an adapter ({matched[0]!r}, "
            "…): parameters of fewer than two axes, of integers, or trained whole; "
            f"{trees.nearest(pattern.pattern, candidates)}"
        )
    return assigned
