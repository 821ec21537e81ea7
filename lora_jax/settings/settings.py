"""`Settings`: everything that decides a run, from a config to its hash and back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.settings.fields import BOOKKEEPING, LANE, plain_value, typed
from lora_jax.settings.schema import (
    METHODS,
    SECTION_TYPES,
    SECTIONS,
    SETTINGS,
    TABLES,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
    check,
    check_method_has,
    facts_of,
)

# Parts of a config that are no settings of the run: where and on what it is computed.
_NOT_HASHED = ("workdir", "mesh", "logging")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    `extra` has what the user's config holds outside of the five sections. `named` are settings that
    are not `recorded` and that the config names all the same, at their default: they are recorded
    then, as in the configs of earlier versions.
    """

    seed: int = 0
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    named: frozenset[str] = frozenset()

    @classmethod
    def from_config(cls, config: Any) -> Settings:
        """The settings of a config: a `ConfigDict`, nested mappings, or `Settings` themselves.

        What the config omits has its default; the input is untouched. Raises `RequestError` for an
        unknown setting or a value of another type, not for one that is missing or out of range
        (`check_complete`, `check`).
        """
        if isinstance(config, Settings):
            return config
        plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return cls.from_flat(_flat_settings(plain))

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Settings:
        """`from_config` of `{"method.rank": 8, …}`; a key of no section is the user's own."""
        sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        extra: dict[str, Any] = {}
        for key, value in flat.items():
            section, _, name = key.partition(".")
            if section in SECTIONS:
                sections[section][name] = typed(key, value, facts_of(key))
            elif key != "seed":
                extra[key] = plain_value(value)
        _fill_by_task(sections)
        named = frozenset(
            f"{section}.{name}"
            for section, values in sections.items()
            for name, value in values.items()
            if not (facts := SETTINGS[f"{section}.{name}"]).recorded and value == facts.default
        )
        method = sections["method"]
        shared = {name: method.pop(name) for name in MethodSettings.SHARED if name in method}
        sections["method"] = {**shared, "own": method}
        made: dict[str, Any] = {kind.NAME: kind(**sections[kind.NAME]) for kind in SECTION_TYPES}
        seed = typed("seed", flat.get("seed", 0), SETTINGS["seed"])
        return cls(seed=seed, **made, extra=extra, named=named)

    def flat(self) -> dict[str, Any]:
        """`{"seed": 0, "method.rank": 8, …}`: all that the run's records hold."""
        found: dict[str, Any] = {"seed": self.seed}
        for section in SECTIONS:
            for name, value in dict(getattr(self, section)).items():
                key = f"{section}.{name}"
                facts = SETTINGS[key]
                recorded = facts.recorded and not (facts.default is None and value is None)
                if key in self.named or recorded or value != facts.default:
                    found[key] = value
        return {**found, **self.extra}

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested dicts, as a config has them."""
        nested: dict[str, Any] = {name: {} for name in SECTIONS}
        for key, value in self.flat().items():
            *parents, name = key.split(".")
            place = functools.reduce(lambda at, parent: at.setdefault(parent, {}), parents, nested)
            place[name] = value
        return nested

    def replace(self, changes: Mapping[str, Any]) -> Settings:
        """These settings with `{"method.rank": 4, …}` in their places.

        Raises `RequestError` for an unknown setting, a value of another type, or a setting of
        methods that the config does not name and its method does not have.
        """
        flat = self.flat()
        for key, value in changes.items():
            if key not in SETTINGS and key not in self.extra:
                known = [*self.extra, *SETTINGS]
                raise RequestError(f"the config has no setting {key!r}; {nearest(key, known)}")
            value = typed(key, value, SETTINGS[key]) if key in SETTINGS else plain_value(value)
            old = flat.get(key)
            if isinstance(old, float) and type(value) is int:
                value = float(value)  # one number, one hash
            if key in self.extra and old is not None and not isinstance(value, type(old)):
                raise RequestError(f"{key}={value!r} has another type than the config's {old!r}")
            flat[key] = value
        for key in changes.keys() - self.flat().keys():
            section, _, name = key.partition(".")
            if section == "method":
                check_method_has(flat.get("method.name"), name)
        return Settings.from_flat(flat)

    def check(self) -> None:
        """Raises `RequestError` for a value out of range."""
        check("seed", self.seed)
        for section in SECTIONS:
            getattr(self, section).check()

    def check_complete(self, sections: tuple[str, ...] = SECTIONS) -> None:
        """Raises `RequestError` that names every setting that is missing and has no default."""
        missing = []
        for key, facts in SETTINGS.items():
            section, _, name = key.partition(".")
            asked = facts.required and section in sections
            if asked and getattr(self, section)[name] in (None, ""):
                missing.append(f"{key} (such as {facts.example!r})")
        if "train" in sections and not self.train.num_steps and not self.train.num_epochs:
            missing.append("train.num_epochs or train.num_steps (such as 2.0 or 1000)")
        if missing:
            raise RequestError(f"the config lacks {', '.join(missing)}")

    @property
    def hash(self) -> str:
        """sha256 (hex) of all settings that identify a run; their order does not count."""
        return config_hash(plain_config(self))

    @property
    def base_key(self) -> str:
        """Runs of one key share model and data."""
        plain = plain_config(self)
        return json.dumps([plain["model"], plain["data"]], sort_keys=True)

    def program_key(self, *, with_seed: bool = False) -> str:
        """Runs of one key may share a program: all but what each lane of a pack has of its own.

        `with_seed` counts the seed, for runs whose seed decides what they share.
        """
        shared = {
            key: value
            for key, value in hashed_settings(plain_config(self)).items()
            if key not in SETTINGS or SETTINGS[key].role != LANE or (with_seed and key == "seed")
        }
        # A rate of its own is one number more in the optimizer's state.
        expressions = [expression for expression, _ in self.optimizer.lr_by_path]
        return json.dumps([shared, bool(self.optimizer.head_lr), expressions], sort_keys=True)


def complete(config: Any) -> Settings:
    """`Settings.from_config` of a config that must lack nothing. Raises `RequestError`."""
    settings = Settings.from_config(config)
    settings.check_complete()
    return settings


def _flat_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The sections' settings by dotted name, the user's own ones too, however deep they lie."""
    flat = {}
    for section, values in plain.items():
        if section not in SECTIONS:
            if "." in str(section):
                raise RequestError(f"the config has no setting {section!r}; names hold no dots")
            flat |= flat_config({section: values})
        elif not isinstance(values, Mapping):
            raise RequestError(
                f"{section}={values!r} must be a section of settings: "
                f"config.{section} = ConfigDict()"
            )
        else:
            flat |= {f"{section}.{name}": value for name, value in values.items()}
    return flat


def _fill_by_task(sections: Mapping[str, dict[str, Any]]) -> None:
    """A new head must train; files of completions have other columns than files of classes."""
    is_lm = sections["model"].get("head") == "causal-lm"
    data, method = sections["data"], sections["method"]
    if data.get("source") in TABLES:
        data.setdefault("text", "prompt" if is_lm else "text")
        data.setdefault("label", "completion" if is_lm else "label")
    name = method.get("name")
    moves_all = name in METHODS and METHODS[name].moves_all
    method.setdefault("train", "" if moves_all or is_lm else "head/.*")


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"method.rank": 8, ...}`: plain values by dotted name.

    >>> flat_config({"seed": 0, "method": {"rank": 8}})
    {'seed': 0, 'method.rank': 8}
    """
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flat_config(value).items()}
        else:
            flat[key] = value
    return flat


def hashable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `flat_config`, with lists as tuples.

    >>> hashable_settings({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': (2,)}
    """
    flat = flat_config(config)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}


def plain_config(config: Any) -> dict[str, Any]:
    """A config (`Settings`, `ConfigDict` or mapping) as plain dicts and JSON values."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(plain))


def hashed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is, by dotted name: a plain config's, as it stands."""
    return {
        key: value
        for key, value in flat_config(config).items()
        if key.partition(".")[0] not in _NOT_HASHED
        and (key not in SETTINGS or SETTINGS[key].role != BOOKKEEPING)
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """The hash of a plain config as it stands in a card or config.json, nothing filled in.

    Hex SHA-256 over its `hashed_settings` in canonical JSON: their order does not count.
    """
    canonical = json.dumps(hashed_settings(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
