"""The record of a finished run, card.json: what was asked, where it ran, and what came out."""

from __future__ import annotations

import dataclasses
import functools
import os
import reprlib
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.io.untrusted import COUNT, NUMBER, check_fields, check_kind
from lora_jax.train.workdir import is_folder_name, read_json_file

RESTORE = "restore it, or remove the cell's folder to train it again"
# Settings that reports and sweeps read; the rest of a card's config is checked where it is used.
_SETTINGS: Mapping[str, Any] = {
    "config.model": dict, "config.method.name": str, "?config.seed": int, "?config.data.seed": int,
    "?config.optimizer.lr": NUMBER,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardPart:
    """A JSON object of a card, with an attribute per key.

    A field without a default is in every card; the others are None in cards of versions that had
    not got them. `others` holds the keys that are no field, so that a card of a later version
    comes back unchanged from `to_json`.
    """

    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON object, keys in order."""
        found = dict(self.others)
        for name in _fields_of(type(self)):
            if (value := getattr(self, name)) is not None:
                found[name] = value.to_json() if isinstance(value, CardPart) else value
        return dict(sorted(found.items()))

    def __getitem__(self, name: str) -> Any:
        """Deprecated, for one release: cards were dicts."""
        warnings.warn(
            f"{type(self).__name__}[{name!r}] is deprecated; use its attribute {name}",
            DeprecationWarning,
            stacklevel=2,
        )
        value = getattr(self, name, None) if name in _fields_of(type(self)) else None
        return self.others[name] if value is None else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts(CardPart):
    """Trained parameters: of the task head, of all else, and of both."""

    adapter: int
    head: int
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds(CardPart):
    """Seconds that the run took, by kind of work; of a packed run its share of the pack's.

    `total` includes `compile`; `shared_by` counts the runs of the pack. Other kinds ("train",
    "evaluate") are in `others`.
    """

    total: float
    per_step: float
    compile: float
    shared_by: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(CardPart):
    """The compiled program, and the pack if the run was one of several.

    `K` runs shared the program, this one in lane `slot`; `cells` names them by lane, `at_once` is
    how many were computed side by side (0: all), `pack` the pack's folder. `memory_bytes` are those
    of one device. `mesh` is as `--mesh` has it. `numerics` are the settings that change bits,
    `numerics_changes` those that a resumed run found changed.
    """

    K: int
    slot: int
    ranks: list[int]
    targets: list[str]
    batch_shapes: list[list[int]]
    threads: int
    xla_flags: str
    matmul_precision: str
    pack: str | None = None
    cells: list[str] | None = None
    at_once: int | None = None
    memory_bytes: int | None = None
    mesh: str | None = None
    numerics: dict[str, Any] | None = None
    numerics_changes: list[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainLoss(CardPart):
    """The mean training loss of the last entry of metrics.jsonl."""

    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestScores(CardPart):
    """Of the best step on the validation split, whose weights were saved."""

    loss: float
    accuracy: float
    best_step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalScores(CardPart):
    """Of the saved weights on the `n` examples of the test split; `tokens` counts texts' tokens."""

    loss: float
    accuracy: float
    n: int
    tokens: int | None = None

    @property
    def task_metrics(self) -> dict[str, float]:
        """What else the data set is judged by (`train/task_metrics.py`), such as "matthews"."""
        return {name: value for name, value in self.others.items() if isinstance(value, float)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics(CardPart):
    """What came out: scores by split, why and when training stopped, and what was saved."""

    train: TrainLoss
    validation: BestScores
    test: FinalScores
    stopped: str
    steps: int
    adapter_bytes: int
    weights_sha256: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(CardPart):
    """The record of a finished run.

    The hashes (sha256, hex) are of the config's settings, the base model's weights and the data.
    `config_file` and `config_arg` are the file that made the config and what stood after its colon
    (None: nothing); they are no settings and not hashed. `commit` is this package's, `finished` the
    time in ISO 8601.

    Indexing (`card["metrics"]["test"]["loss"]`) works for one more release with a
    `DeprecationWarning`; write `card.metrics.test.loss`.
    """

    config: dict[str, Any]
    config_hash: str
    base_hash: str
    data_hash: str
    seeds: dict[str, int]
    device: dict[str, Any]
    program: Program
    counts: Counts
    seconds: Seconds
    metrics: Metrics
    versions: dict[str, str]
    commit: str
    finished: str | None = None
    config_file: str | None = None
    config_arg: str | None = None

    @classmethod
    def read(cls, path: str | os.PathLike) -> Card:
        """The card in the file at `path`. Raises `RequestError` for what is no card."""
        return cls.from_json(read_json_file(path), path)

    def write(self, path: str | os.PathLike) -> None:
        """Writes the card to `path`, atomically. Raises `RequestError` if the disk refuses it."""
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, values: Any, place: str | os.PathLike = "the card") -> Card:
        """The card of a JSON object.

        Args:
          values: as `to_json` gives it, of this or an earlier version.
          place: where it was read, for messages.

        Raises:
          RequestError: a field is missing or of another kind, or a packed run's cells have names
            that are no folders.
        """
        check_fields(values, {}, place, RESTORE)
        card = _part(cls, values, place)
        check_fields(values, _SETTINGS, place, RESTORE)
        if card.program.K > 1:
            of_pack = {"program.cells": list, "program.at_once": COUNT}
            check_fields(values, of_pack, place, RESTORE)
        for name in card.program.cells or ():
            if not is_folder_name(name):
                raise RequestError(f"{place} names a cell {reprlib.repr(name)}; {RESTORE}")
        if card.config_arg is None:  # as earlier versions had it, in one
            file, arg = config_parts(card.config_file or "")
            return dataclasses.replace(card, config_file=file, config_arg=arg)
        return card

    @property
    def config_name(self) -> str | None:
        """The config as `--config=` takes it, "FILE.py[:arg]"; None if the card has no file."""
        arg = "" if self.config_arg is None else f":{self.config_arg}"
        return f"{self.config_file}{arg}" if self.config_file else None


def config_parts(name: str) -> tuple[str | None, str | None]:
    """A card's `config_file` and `config_arg` of what `--config=` had, "" if there was no file.

    >>> config_parts("my.py:lora"), config_parts("my.py")
    (('my.py', 'lora'), ('my.py', None))
    """
    file, colon, arg = name.partition(":")
    return file or None, arg if colon else None


_P = typing.TypeVar("_P", bound=CardPart)


@functools.cache
def _fields_of(kind: type[CardPart]) -> dict[str, tuple[Any, bool]]:
    """`{name: (type, whether every card has it)}` of the fields of a part, without `others`."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):
            hint = typing.get_args(hint)[0]
        found[field.name] = (hint, field.default is dataclasses.MISSING)
    del found["others"]
    return found


def _part(kind: type[_P], values: Mapping[str, Any], place: Any, prefix: str = "") -> _P:
    found = {}
    for name, (hint, always) in _fields_of(kind).items():
        if name in values:
            found[name] = _typed(hint, values[name], f"{prefix}{name}", place)
        elif always:
            raise RequestError(f"{place}: {prefix}{name} is missing; {RESTORE}")
    return kind(**found, others={name: x for name, x in values.items() if name not in found})


def _typed(hint: Any, value: Any, name: str, place: Any) -> Any:
    """The JSON value of a field of type `hint`. Raises `RequestError` if it is another kind."""
    if hint is Any:
        return value
    kind = typing.get_origin(hint) or hint
    is_part = issubclass(kind, CardPart)
    wanted = dict if is_part else {int: COUNT, float: NUMBER}.get(kind, kind)
    check_kind(value, wanted, name, place, RESTORE)
    if is_part:
        return _part(kind, value, place, f"{name}.")
    items = value.items() if kind is dict else enumerate(value) if kind is list else ()
    for key, item in items:
        _typed(typing.get_args(hint)[-1], item, f"{name}[{reprlib.repr(key)}]", place)
    return value
