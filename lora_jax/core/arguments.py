"""Keyword arguments that a class does not have, answered with the nearest it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_jax.core import trees
from lora_jax.core.errors import RequestError

_VAR_KEYWORDS = 0x08  # the flag of a function with **settings


def _takes_any(kind: type) -> bool:
    code = getattr(kind.__init__, "__code__", None)
    return code is None or bool(code.co_flags & _VAR_KEYWORDS)


class NamedSettings:
    """A class whose unknown keyword arguments raise `RequestError` with the nearest name."""

    def __new__(cls, *args, **settings):
        if not _takes_any(cls):
            code = cls.__init__.__code__
            known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            for name in settings:
                if name not in known:
                    raise RequestError(cls._unknown_setting(name, known))
        return super().__new__(cls)

    @classmethod
    def _unknown_setting(cls, name: str, known) -> str:
        written = [
            kind for kind in cls.__mro__[1:] if "__init__" in vars(kind) and kind is not object
        ]
        if written and _takes_any(written[0]) and not _takes_any(cls):
            return (
                f"{cls.__name__} takes no {name!r}, since its own __init__ has none; write "
                "@dataclasses.dataclass(frozen=True, init=False) above it, which keeps "
                f"{written[0].__name__}'s"
            )
        return f"{cls.__name__} has no setting {name!r}; {trees.nearest(name, known)}"


def checked_names(setting: str, value: Any) -> str | tuple[str, ...]:
    """A text, or several as a tuple. Raises `RequestError` for anything else."""
    if isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, bytes) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise RequestError(f"{setting} is {value!r}; it must be a text or a sequence of texts")
    return names
