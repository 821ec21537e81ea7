"""Configs made complete: defaults filled in, types checked, settings put in from outside.

The command line, `lora_jax.train` and sweeps read every config through here. A config that gives
all its settings comes out with the same hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import nearest
from lora_jax.data.tables import EXTENSIONS
from lora_jax.methods.registry import kind_of, settings_of
from lora_jax.train.schema import ABSENT, REQUIRED, SECTIONS, SETTINGS, typed


def complete(config: Any) -> ConfigDict:
    """A config with its defaults filled in, each value of the right type; the input is untouched.

    Args:
      config: a `ConfigDict`, or nested mappings, with the sections `model`, `data`, `method`,
        `optimizer` and `train`. Settings outside of these sections are kept as they are.

    Returns:
      A locked `ConfigDict`.

    Raises:
      RequestError: settings are missing that have no default, unknown, or of another type.
    """
    config = fill(config)
    check_not_missing(config)
    return config


def fill(config: Any) -> ConfigDict:
    """`complete` of a config that may lack settings without a default."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    for section in SECTIONS:
        if not isinstance(plain.setdefault(section, {}), Mapping):
            raise RequestError(
                f"{section}={plain[section]!r} must be a section of settings: "
                f"config.{section} = ConfigDict()"
            )
        plain[section] = dict(plain[section])
    for key in _keys_of(plain):
        section, _, name = key.rpartition(".")
        inside = plain[section] if section else plain
        inside[name] = typed(key, inside[name])
    for key, setting in SETTINGS.items():
        section, _, name = key.rpartition(".")
        if setting.default not in (REQUIRED, ABSENT):
            (plain[section] if section else plain).setdefault(name, setting.default)
    _fill_by_task(plain)
    return ConfigDict(plain).lock()


def _keys_of(plain: Mapping[str, Any]) -> list[str]:
    """The settings there are, by dotted name. Raises `RequestError` for an unknown one."""
    keys = [f"{section}.{name}" for section in SECTIONS for name in plain[section]]
    for key in keys:
        if key not in SETTINGS:
            raise RequestError(f"the config has no setting {key!r}; {nearest(key, SETTINGS)}")
    return [*keys, *(["seed"] if "seed" in plain else [])]


def _fill_by_task(plain: dict[str, Any]) -> None:
    """A new head must train; files of completions have other columns than files of classes."""
    is_lm = plain["model"].get("head") == "causal-lm"
    data, method = plain["data"], plain["method"]
    if data.get("source") in EXTENSIONS:
        data.setdefault("text", "prompt" if is_lm else "text")
        data.setdefault("label", "completion" if is_lm else "label")
    moves_all = method.get("name") in ("intrinsic", "uni_lora")
    method.setdefault("train", "" if moves_all or is_lm else "head/.*")


def check_not_missing(config: Mapping[str, Any], sections: tuple[str, ...] = SECTIONS) -> None:
    """Raises `RequestError` that names every setting that is missing and has no default."""
    missing = [
        f"{key} (such as {setting.example!r})"
        for key, setting in SETTINGS.items()
        if setting.default is REQUIRED
        and key.partition(".")[0] in sections
        and config[key.partition(".")[0]].get(key.partition(".")[2]) in (None, "")
    ]
    train = config["train"]
    if "train" in sections and not train["num_steps"] and not train["num_epochs"]:
        missing.append("train.num_epochs or train.num_steps (such as 2.0 or 1000)")
    if missing:
        raise RequestError(f"the config lacks {', '.join(missing)}")


def put_settings(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Puts `{"section.key": value}` into a `ConfigDict`, of whatever type its value was before.

    Raises `RequestError` for a setting of methods that the config does not list and its method
    does not have.
    """
    own = [key.partition(".")[2] for key in values if key.startswith("method.")]
    listed = config.get("method") or {}
    new = [name for name in own if name not in listed and name not in ("name", "train", "rows")]
    with config.unlocked(), config.ignore_type():
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            if section and section not in config:
                config[section] = ConfigDict()
            (config[section] if section else config)[name] = value
    for name in new if "name" in config.method else ():
        method = config.method.name
        if name not in (settings := settings_of(kind_of(method))):
            near = nearest(name, settings)
            raise RequestError(f"method {method!r} has no setting {name!r}; {near}")
