"""What is said of a target that matches no parameter: the nearest paths, and the likely slip."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.core import trees

# The aliases of the model families that `load_model` knows.
FAMILY_ALIASES = frozenset(
    {"q", "k", "v", "o", "c_attn", "up", "down", "gate", "embed", "head", "all-linear"}
)


def near_paths(
    pattern: str,
    paths: Sequence[str],
    aliases: Mapping[str, Any] | None,
    matcher: Callable[[str], re.Pattern[str]],
) -> str:
    """The tail of an error about a pattern that matches none of `paths`.

    `matcher` compiles an expression (`rules.pattern_of`).

    >>> near_paths("kernel", ["dense/kernel"], None, re.compile)
    "nearest: 'dense/kernel'; an expression must match the whole path: write '.*/kernel'"
    """
    near = trees.nearest(pattern, paths)
    if whole := _whole_path(pattern, paths, matcher):
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


def _whole_path(
    pattern: str, paths: Sequence[str], matcher: Callable[[str], re.Pattern[str]]
) -> str | None:
    """`pattern` as an expression of whole paths, if it is one of their ends or middles."""
    dotted = re.fullmatch(r"\w+(\\?\.\w+)+", pattern)  # as torch names modules
    inners = (re.sub(r"\\?\.", "/", pattern), pattern) if dotted else (pattern,)
    for inner in inners:
        group = f"(?:{inner})" if "|" in inner else inner
        for whole in (f".*/{group}", f".*/{group}/.*", f"{group}/.*", group):
            if whole != pattern and any(matcher(whole).fullmatch(path) for path in paths):
                return whole
    return None
