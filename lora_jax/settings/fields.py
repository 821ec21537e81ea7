"""One setting: its type, default, range, role and help, and the checks that follow from them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest

# Roles. Identity: part of the hash. Lane: hashed too, and data of a pack, so cells that differ in
# it may share a program. Bookkeeping: no part of the hash.
IDENTITY, LANE, BOOKKEEPING = "identity", "lane", "bookkeeping"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of one setting.

    `kind` is a key of `KINDS`. `default` None: no default, or the method's own. `recorded`: whether
    every config records it; one that is not recorded is in a config (and its hash) only where the
    config names it or it differs from its default, so adding such a setting changes no hash.
    `low`, `high` (inclusive), `above` and `below` bound a number, `choices` lists texts.
    """

    kind: str
    default: Any = None
    help: str = ""
    unit: str = ""
    example: Any = None
    required: bool = False
    recorded: bool = True
    role: str = IDENTITY
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def may_be_none(self) -> bool:
        """Whether None, like an omitted setting, means the default."""
        return self.default is None and not self.required

    @property
    def shown(self) -> Any:
        """A value that the setting may have, for messages."""
        if self.example is not None:
            return self.example
        return KINDS[self.kind].example if self.default in (None, "") else self.default

    @property
    def range(self) -> str:
        """The bounds in words: "at least 0 and below 1"; or the choices."""
        words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
        bounds = [(word, getattr(self, name)) for name, word in words.items()]
        said = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return said or ", ".join(filter(None, self.choices))


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What messages call values of a kind, an example, and the cast, None for another type."""

    what: str
    example: Any
    cast: Any


def setting(default: Any = None, help: str = "", **facts: Any) -> Any:
    """A dataclass field that carries a `Setting`; its kind follows from the annotation.

    Methods and rules describe theirs with plain `metadata`, which `setting_of` reads as well.
    """
    return dataclasses.field(default=default, metadata={"help": help, **facts})


# A `setting` that a config records only where it names it or it is not the default.
optional = functools.partial(setting, recorded=False)


def setting_of(field: dataclasses.Field, **facts: Any) -> Setting:
    """The `Setting` that a dataclass field describes; `facts` overrule its metadata."""
    default = None if field.default is dataclasses.MISSING else field.default
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    kind = _KIND_OF_ANNOTATION.get(kind.removesuffix(" | None"), "any")
    given = {key: x for key, x in field.metadata.items() if key in Setting.__dataclass_fields__}
    return Setting(**{"kind": kind, "default": default, **given, **facts})


def typed(key: str, value: Any, facts: Setting) -> Any:
    """The value as its type has it: NumPy's scalars as Python's, lists as tuples.

    Raises `RequestError` that names the setting, the value and the right type.
    """
    plain = plain_value(value)
    if plain is None and facts.may_be_none:
        return None
    if plain == "" and key.startswith("method.") and facts.may_be_none:
        return plain  # the method's own default
    kind = KINDS[facts.kind]
    if (found := kind.cast(plain)) is None:
        raise RequestError(f"{key}={value!r} must be {kind.what}, such as {facts.shown!r}")
    return found


def check_range(key: str, value: Any, facts: Setting) -> Any:
    """The value, typed. Raises `RequestError` for another type, or a value out of range."""
    value = typed(key, value, facts)
    if facts.choices:
        if value not in (None, *facts.choices):
            raise RequestError(f"{key}={value!r} is unknown; {nearest(value, facts.choices)}")
    elif facts.kind in ("whole", "number") and value is not None and not _within(value, facts):
        bounds = facts.range or "and finite"
        raise RequestError(f"{key}={value!r} must be {KINDS[facts.kind].what}, {bounds}")
    return value


def _within(value: float, facts: Setting) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (facts.low is None or value >= facts.low)
        and (facts.above is None or value > facts.above)
        and (facts.high is None or value <= facts.high)
        and (facts.below is None or value < facts.below)
    )


def parse(key: str, text: str, facts: Setting) -> Any:
    """The value of a setting from the command line's text. Raises `RequestError` as `typed`."""
    kind = facts.kind
    if kind in ("text", "path") or (kind == "names" and text[:1] not in ("(", "[")):
        return typed(key, text, facts)
    value = literal(text)
    if kind == "names" and _names(plain_value(value)) is None:
        value = text  # an expression that begins with a group
    if kind == "flag" and value in (0, 1) and not isinstance(value, float):
        value = bool(value)
    return typed(key, value, facts)


def literal(text: str) -> Any:
    """A number, a boolean or a tuple as Python writes it; else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text).strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text


def plain_value(value: Any) -> Any:
    """NumPy's scalars and arrays as Python's, lists as tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(plain_value, value)) if isinstance(value, list | tuple) else value


def _names(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        return value
    are_texts = isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    return value if are_texts else None


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _wholes(value: Any) -> tuple[int, ...] | None:
    given = value if isinstance(value, tuple) else (value,)
    found = tuple(n for n in map(_whole, given) if n is not None)
    return found if len(found) == len(given) else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _only(*types: type) -> Any:
    return lambda value: value if isinstance(value, types) else None


def _rates(value: Any) -> tuple[tuple[str, float], ...] | None:
    """Pairs of a regular expression and a learning rate, from a mapping or a tuple of pairs."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    return pairs if isinstance(pairs, tuple) and all(map(_is_rate, pairs)) else None


def _is_rate(pair: Any) -> bool:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
        return False
    try:
        re.compile(pair[0])
    except re.error:
        return False
    rate = _number(pair[1])
    return rate is not None and 0 <= rate < math.inf


KINDS = {
    "text": _Kind("a text", "linear", _only(str)),
    "path": _Kind("a text", "minilm", _only(str)),
    "names": _Kind("a text or a tuple of texts", "q,v", _names),
    "whole": _Kind("a whole number", 8, _whole),
    "wholes": _Kind("a tuple of whole numbers", (16, 32), _wholes),
    "number": _Kind("a number", 0.1, _number),
    "flag": _Kind("True or False", True, _only(bool)),
    "rules": _Kind("a list of rules", [{"targets": "q", "rank": 4}], _only(tuple)),
    "rows": _Kind("a mapping of expressions to row numbers", {"embed": (0, 1)}, _only(Mapping)),
    "rates": _Kind(
        "pairs of a regular expression and a learning rate of at least 0", ((".*/b", 0.01),), _rates
    ),
    "any": _Kind("a value", 0, lambda value: value),
}
_KIND_OF_ANNOTATION = {
    "str": "text",
    "int": "whole",
    "float": "number",
    "bool": "flag",
    "tuple[int, ...]": "wholes",
    "tuple[int, int, int]": "wholes",
    "Sequence[int]": "wholes",
    "str | Sequence[str]": "names",
    "tuple[Rule, ...]": "rules",
    "Mapping[str, Sequence[int]]": "rows",
}
