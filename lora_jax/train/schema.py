"""The settings of a config: the type of each, and its default where a config may omit it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.optional import OPTIONAL

SECTIONS = ("model", "data", "method", "optimizer", "train")
LARGEST_BATCH = 2**20
# Defaults that are no values: the setting must be given, or may stay absent.
REQUIRED, ABSENT = object(), object()


class Setting(NamedTuple):
    """`kind` is a key of `_KINDS`; `default` is put into a config that lacks the setting."""

    kind: str
    default: Any
    example: Any = None


# Kind: what an error calls it, and an example where the setting has no default to show.
_KINDS = {
    "text": ("a text", "linear"),
    "path": ("a text", "minilm"),
    "names": ("a text or a tuple of texts", "q,v"),
    "whole": ("a whole number", 8),
    "wholes": ("a tuple of whole numbers", (16, 32)),
    "number": ("a number", 0.1),
    "flag": ("True or False", True),
    "rules": ("a list of rules", [{"targets": "q", "rank": 4}]),
    "rows": ("a mapping of expressions to row numbers", {"embed": (0, 1)}),
}

_OF_MODEL_DATA_TRAINING = {
    "seed": Setting("whole", 0),
    "model.name": Setting("path", REQUIRED, "minilm"),
    "model.dtype": Setting("text", "float32"),
    "model.head": Setting("text", ABSENT, "classification"),
    "model.num_labels": Setting("whole", ABSENT, 2),
    "model.scan_layers": Setting("flag", ABSENT),
    "data.source": Setting("text", REQUIRED, "jsonl"),
    "data.path": Setting("path", "", "texts.jsonl"),
    "data.text": Setting("text", ABSENT, "text"),
    "data.label": Setting("text", ABSENT, "label"),
    "data.task": Setting("text", ABSENT, "sst2"),
    "data.max_length": Setting("whole", 128),
    "data.buckets": Setting("wholes", (16, 32, 64, 128, 256, 512)),
    "data.batch_size": Setting("whole", 32),
    "data.seed": Setting("whole", 0),
    "data.limit": Setting("whole", 0),
    "data.eval_limit": Setting("whole", ABSENT, 0),
    "optimizer.lr": Setting("number", REQUIRED, 1e-3),
    "optimizer.schedule": Setting("text", "linear"),
    "optimizer.warmup_ratio": Setting("number", 0.0),
    "optimizer.warmup_steps": Setting("whole", ABSENT, 100),
    "optimizer.weight_decay": Setting("number", 0.01),
    "optimizer.beta1": Setting("number", 0.9),
    "optimizer.beta2": Setting("number", 0.999),
    "optimizer.eps": Setting("number", 1e-8),
    "optimizer.clip_norm": Setting("number", 1.0),
    "train.num_epochs": Setting("number", 0.0, 2.0),
    "train.num_steps": Setting("whole", 0, 1000),
    "train.label_smoothing": Setting("number", 0.0),
    "train.model_dropout": Setting("flag", ABSENT),
    "train.eval_every_steps": Setting("whole", 0),
    "train.checkpoint_every_steps": Setting("whole", 0),
    "train.patience": Setting("whole", 0),
    "train.eval_batch_size": Setting("whole", 128),
    "train.log_every_steps": Setting("whole", 10),
}
# Absent ones have the method's own default.
_OF_METHODS = {
    "method.name": Setting("text", REQUIRED, "lora"),
    "method.train": Setting("names", ABSENT, "head/.*"),
    "method.rows": Setting("rows", ABSENT),
    "method.targets": Setting("names", ABSENT),
    "method.exclude": Setting("names", ABSENT),
    "method.rank": Setting("whole", ABSENT),
    "method.alpha": Setting("number", ABSENT, 16.0),
    "method.dropout": Setting("number", ABSENT),
    "method.init": Setting("text", ABSENT, "kaiming_uniform"),
    "method.layers": Setting("wholes", ABSENT, (0, 1)),
    "method.slice": Setting("wholes", ABSENT, (-1, 0, 768)),
    "method.rules": Setting("rules", ABSENT),
    "method.ratio": Setting("number", ABSENT, 16.0),
    "method.projection_seed": Setting("whole", ABSENT, 0),
    "method.dim": Setting("whole", ABSENT, 100),
    "method.projection": Setting("text", ABSENT, "fastfood"),
    "method.structure": Setting("text", ABSENT, "did"),
    "method.start": Setting("text", ABSENT, "uniform"),
}
_KIND_OF_TYPE = {str: "text", bool: "flag", int: "whole", float: "number"}
SETTINGS: dict[str, Setting] = {
    **_OF_MODEL_DATA_TRAINING,
    **_OF_METHODS,
    **{
        key: Setting(_KIND_OF_TYPE[type(default)], ABSENT, default)
        for key, default in OPTIONAL.items()
    },
}


def typed(key: str, value: Any) -> Any:
    """The value of a setting as its type has it: NumPy's scalars as Python's, lists as tuples.

    Raises `RequestError` that names the setting, the value and the right type.
    """
    setting = SETTINGS[key]
    plain = plain_value(value)
    if plain is None and may_be_none(key):
        return None
    if plain == "" and key.startswith("method.") and setting.default is ABSENT:
        return plain  # the method's own default
    if (found := _CASTS[setting.kind](plain)) is None:
        what = _KINDS[setting.kind][0]
        raise RequestError(f"{key}={value!r} must be {what}, such as {example_of(key)!r}")
    if key.endswith("batch_size") and found > LARGEST_BATCH:
        raise RequestError(f"{key}={found} must be at most {LARGEST_BATCH}")
    return found


def may_be_none(key: str) -> bool:
    """Whether None means that the setting is not given."""
    of_method = key.startswith("method.") and SETTINGS[key].default is ABSENT
    return of_method or key in ("model.head", "model.num_labels")


def example_of(key: str) -> Any:
    """A value that a setting may have."""
    setting = SETTINGS[key]
    if setting.example is not None:
        return setting.example
    of_kind = _KINDS[setting.kind][1]
    return of_kind if setting.default in (REQUIRED, ABSENT) else setting.default


def parse(key: str, text: str) -> Any:
    """The value of a setting from the command line's text. Raises `RequestError` as `typed`."""
    kind = SETTINGS[key].kind
    if kind in ("text", "path") or (kind == "names" and text[:1] not in ("(", "[")):
        return typed(key, text)
    value = literal(text)
    if kind == "names" and _names(plain_value(value)) is None:
        value = text  # an expression that begins with a group
    if kind == "flag" and value in (0, 1) and not isinstance(value, float):
        value = bool(value)
    return typed(key, value)


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


# Each gives None for a value of another type.


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


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
    found = tuple(map(_whole, value if isinstance(value, tuple) else (value,)))
    return None if None in found else found


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _rules(value: Any) -> tuple | None:
    return value if isinstance(value, tuple) else None


def _rows(value: Any) -> Mapping | None:
    return value if isinstance(value, Mapping) else None


_CASTS = {
    "text": _text,
    "path": _text,
    "names": _names,
    "whole": _whole,
    "wholes": _wholes,
    "number": _number,
    "flag": _flag,
    "rules": _rules,
    "rows": _rows,
}
