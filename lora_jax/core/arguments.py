"""Keyword arguments that a class does not have, answered with the nearest it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest

_VAR_KEYWORDS = 0x08  # the flag of a function with **settings


class NamedSettings:
    """A class whose unknown keyword arguments raise `RequestError` with the nearest name."""

    def __new__(cls, *args: Any, **settings: Any):
        known = _settings_of(cls)
        for name in settings:
            if name not in known:
                raise RequestError(
                    f"{cls.__name__} has no setting {name!r}; {nearest(name, known)}"
                )
        return super().__new__(cls)


def _settings_of(cls: type) -> list[str]:
    """What `cls(…)` takes: the arguments of its `__init__`, and of those that `**settings` reach.

    A dataclass whose `__init__` passes `**settings` on takes its own fields, too.
    """
    known: list[str] = []
    for kind in cls.__mro__:
        code = getattr(vars(kind).get("__init__"), "__code__", None)
        if code is None:
            continue
        known += code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        if not code.co_flags & _VAR_KEYWORDS:
            break
        known += [field.name for field in dataclasses.fields(kind) if field.init]
    return list(dict.fromkeys(known))


def checked_names(setting: str, value: Any) -> str | tuple[str, ...]:
    """A text, or several as a tuple. Raises `RequestError` for anything else."""
    if isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, bytes) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise RequestError(f"{setting} is {value!r}; it must be a text or a sequence of texts")
    return names
