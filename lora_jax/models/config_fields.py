"""Reading a `config.json` one checked field at a time, so that an error names the field."""

import dataclasses
import functools
import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io import untrusted

_REQUIRED = object()
_LARGEST = float(np.finfo(np.float32).max)
# Far above any model known: a file that claims a billion layers should not be believed for an hour.
MOST_LAYERS = 1000


def read_json(path: str | os.PathLike, *, kind: type) -> Any:
    """Returns the JSON in `path`, which must be a `kind` (dict or list); else `RequestError`."""
    path = Path(path)
    try:
        value = untrusted.read_json(path)
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON: {error}; restore the file") from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(value, kind):
        wanted = {dict: "an object", list: "a list"}[kind]
        raise RequestError(f"{path} holds a JSON {type(value).__name__}, not {wanted}")
    return value


class Fields:
    """The fields of one JSON object; every error names the field, its value and the file."""

    def __init__(self, raw: dict[str, Any], place: str):
        self.raw = raw
        self.place = place

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def integer(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        minimum: int = 1,
        maximum: int | None = None,
    ) -> Any:
        """An int, or None where the default is None or the file says null."""
        value = self.value(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, value, f"an integer of at least {minimum}")
        if maximum is not None and value > maximum:
            raise self.error(name, value, f"at most {maximum}")
        return value

    def positive(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.value(name, default)
        if not _is_number(value) or not 0.0 < value <= _LARGEST:
            raise self.error(name, value, "a positive number within float32")
        return float(value)

    def probability(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.value(name, default)
        if not _is_number(value) or not 0.0 <= value < 1.0:
            raise self.error(name, value, "a number in [0, 1)")
        return float(value)

    def choice(self, name: str, choices: Iterable[Any], default: Any = _REQUIRED) -> Any:
        value = self.value(name, default)
        choices = list(choices)
        # `in` alone would take 1 for True and 0 for False.
        if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
            raise self.error(name, value, "one of " + ", ".join(repr(c) for c in choices))
        return value

    def only(self, **values: Any) -> None:
        """Fields that may be absent or have the one value that this project computes."""
        for name, value in values.items():
            self.choice(name, [value], value)

    def config(self, kind: type, **own: Any) -> Any:
        """The dataclass `kind` with `own`; its other fields are read as their annotations say."""
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            read = getattr(hints[field.name], "__metadata__", None)
            if read is None or field.name in own:
                continue
            is_required = field.default is dataclasses.MISSING
            own[field.name] = read[0](self, field.name, _REQUIRED if is_required else field.default)
        return kind(**own)

    def mapping(self, name: str) -> dict[str, Any] | None:
        """The JSON object of that name, None if there is none."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, value, "an object or null")
        return value

    def inner(self, name: str, value: dict[str, Any]) -> "Fields":
        """The fields of an object inside this one."""
        return Fields(value, f"{self.place}, {name}")

    def special_tokens(self, vocab_size: int) -> dict[str, Any]:
        """`bos_token_id`, `eos_token_id` (one or several) and `pad_token_id`, each None if absent.

        An id outside of the vocabulary, as -1, which some files have for "none", is an error,
        except for padding, which is read as none.
        """
        found: dict[str, Any] = {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = self.raw.get(name)
            ids = value if isinstance(value, list) else [value]
            if value is None or (name == "pad_token_id" and value == -1):
                found[name] = None
                continue
            if not ids or not all(type(n) is int and 0 <= n < vocab_size for n in ids):
                raise self.error(name, value, f"a token id from 0 to {vocab_size - 1}, or null")
            found[name] = tuple(ids) if isinstance(value, list) else value
        return found

    def error(self, name: str, value: Any, wanted: str) -> RequestError:
        shown = value if isinstance(value, int | float) else None
        # A line is read by people: neither a thousand digits nor a page of text belong into it.
        text = reprlib.repr(value) if shown is None or abs(shown) > 10**30 else repr(value)
        return RequestError(f"{self.place}: {name} is {text}, but must be {wanted}")

    def value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise RequestError(f"{self.place} lacks {name}; restore the model's own config.json")
        return default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def one_of(*choices: Any) -> Callable[[Fields, str, Any], Any]:
    """What reads a field of a config that is one of these."""
    return lambda fields, name, default: fields.choice(name, choices, default)


def _activation(fields: Fields, name: str, default: Any) -> Any:
    from lora_jax.models.layers import ACTIVATIONS  # imports Flax, which files alone do not need

    return fields.choice(name, ACTIVATIONS, default)


# What a field of a config must be: each annotation holds what reads it.
Size = Annotated[int, Fields.integer]
Depth = Annotated[int, functools.partial(Fields.integer, maximum=MOST_LAYERS)]
Index = Annotated[int, functools.partial(Fields.integer, minimum=0)]
Positive = Annotated[float, Fields.positive]
Probability = Annotated[float, Fields.probability]
Flag = Annotated[bool, one_of(False, True)]
Activation = Annotated[str, _activation]
