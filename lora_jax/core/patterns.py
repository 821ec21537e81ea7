"""Regular expressions over whole paths, their aliases, and what is said if one matches nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.core.arguments import checked_names
from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest

# What matches whole paths: `re.Pattern`, or another object with `fullmatch`.
_engine: Callable[[str], Any] = re.compile


@dataclasses.dataclass(frozen=True)
class Part:
    """What an alias stands for where that is a slice of a kernel: the q of a fused q, k, v.

    `pattern` is a regular expression of whole paths; `slice` is as `Rule` has it.
    """

    pattern: str
    slice: tuple[int, int, int]


Aliases = Mapping[str, "str | Part"]


def match_with(engine: Callable[[str], Any]) -> None:
    """Makes `pattern_of` compile by `engine` in place of `re.compile`.

    `io/matching.py` gives one with a time limit: targets may come with a stranger's adapter.
    """
    global _engine
    _engine = engine


def pattern_of(targets: str | Sequence[str], aliases: Aliases | None = None) -> re.Pattern[str]:
    """The compiled expression of a target: aliases resolved, alternatives joined.

    Raises `RequestError` for an expression that does not compile.

    >>> pattern_of("q,v", {"q": ".*/query/kernel", "v": ".*/value/kernel"}).pattern
    '(?:.*/query/kernel)|(?:.*/value/kernel)'
    """
    parts = [part.pattern for part in patterns_of(targets, aliases)]
    return _compiled(parts[0] if len(parts) == 1 else "|".join(f"(?:{part})" for part in parts))


def patterns_of(
    targets: str | Sequence[str], aliases: Aliases | None = None
) -> list[re.Pattern[str]]:
    """The compiled expression of each member of a target; together they are `pattern_of`."""
    aliases = aliases or {}
    parts: list[str] = []
    for target, names in names_in(checked_names("a target", targets)):
        unknown = [name for name in names if name not in aliases]
        if len(unknown) == len(names):
            parts.append(target)
        elif unknown:
            raise RequestError(
                f"target {unknown[0]!r} in {target!r} is no alias of this model; "
                f"{nearest(unknown[0], aliases)}"
            )
        else:
            parts += [_whole_of(name, aliases[name]) for name in names]
    return [_compiled(part) for part in parts]


def names_in(targets: str | Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each target, and what its commas separate."""
    each = [targets] if isinstance(targets, str) else targets
    return [(target, [name.strip() for name in target.split(",")]) for target in each]


def _whole_of(name: str, value: str | Part) -> str:
    if isinstance(value, Part):
        raise RequestError(
            f"{name!r} is the slice {value.slice} of {value.pattern!r} in this model, which only "
            "the targets= of a low-rank method can take; name the whole kernel"
        )
    return value


def _compiled(part: str) -> re.Pattern[str]:
    try:
        return _engine(part)
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(
            f"targets {part!r} is not a regular expression: {error}; "
            "escape special characters with a backslash"
        ) from error


def check_each_matches(
    what: str,
    targets: str | Sequence[str],
    paths: Sequence[str],
    aliases: Aliases | None = None,
) -> None:
    """Raises `RequestError` for a member of `targets` that matches none of the paths."""
    for pattern in patterns_of(targets, aliases):
        if not any(pattern.fullmatch(path) for path in paths):
            raise RequestError(
                f"{what}={pattern.pattern!r} matches no parameter; "
                f"{near_paths(pattern.pattern, paths, aliases)}"
            )


# The aliases of the model families that `load_model` knows.
FAMILY_ALIASES = frozenset(
    {"q", "k", "v", "o", "c_attn", "up", "down", "gate", "embed", "head", "all-linear"}
)


def near_paths(pattern: str, paths: Sequence[str], aliases: Aliases | None = None) -> str:
    """The tail of an error about a pattern that matches none of `paths`.

    >>> near_paths("kernel", ["dense/kernel"])
    "nearest: 'dense/kernel'; an expression must match the whole path: write '.*/kernel'"
    """
    near = nearest(pattern, paths)
    if whole := _whole_path(pattern, paths):
        return f"{near}; an expression must match the whole path: write {whole!r}"
    words = [word.strip() for word in pattern.split(",")]
    if not aliases and FAMILY_ALIASES.issuperset(words):
        return (
            f"{near}; {', '.join(map(repr, words))}: aliases belong to models of "
            "lora_jax.load_model; write the paths of your own model, or pass aliases={'q': …}"
        )
    if any(path.split("/")[-1].isdecimal() or path.split("/")[0].isdecimal() for path in paths):
        near += " (a number in a path is a place in a list or tuple)"
    return near


def _whole_path(pattern: str, paths: Sequence[str]) -> str | None:
    """`pattern` as an expression of whole paths, if it is one of their ends or middles."""
    dotted = re.fullmatch(r"\w+(\\?\.\w+)+", pattern)  # as torch names modules
    inners = (re.sub(r"\\?\.", "/", pattern), pattern) if dotted else (pattern,)
    for inner in inners:
        group = f"(?:{inner})" if "|" in inner else inner
        for whole in (f".*/{group}", f".*/{group}/.*", f"{group}/.*", group):
            if whole != pattern and any(_compiled(whole).fullmatch(path) for path in paths):
                return whole
    return None
