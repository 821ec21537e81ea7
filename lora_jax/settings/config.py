"""Config files' `ConfigDict`s: made from the settings that differ, and overridden."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.settings.schema import SECTIONS, check_method_has


def make_config(*changes: Mapping[str, Any]) -> ConfigDict:
    """A config of `{"model.name": "minilm", …}`; later mappings overrule earlier ones.

    >>> make_config({"seed": 1, "method.rank": 8}, {"method.rank": 4}).method.rank
    4
    """
    config = ConfigDict({section: {} for section in SECTIONS})
    for one in changes:
        _put(config, one)
    return config


def put_settings(config: Any, values: Mapping[str, Any]) -> None:
    """Puts `{"section.key": value}` into a `ConfigDict`, of whatever type its value was before.

    Raises `RequestError` for a setting of methods that the config does not list and its method
    does not have.
    """
    listed = set(config.get("method") or {})
    _put(config, values)
    method: Any = config.get("method") or {}
    for key in values:
        section, _, name = key.partition(".")
        if section == "method" and name not in listed and "name" in method:
            check_method_has(method.name, name)


def _put(config: Any, values: Mapping[str, Any]) -> None:
    with config.unlocked(), config.ignore_type():
        for key, value in values.items():
            *sections, name = key.split(".")
            place = config
            for section in sections:
                if section not in place:
                    place[section] = ConfigDict()
                place = place[section]
            place[name] = value


def run_file(path: str | Path) -> dict[str, Any]:
    """The names that a config file defines, executed.

    It may import what is next to it, the package that it is part of, and what the working folder
    has.
    """
    folder = root = Path(path).resolve().parent
    while (root / "__init__.py").exists():
        root = root.parent
    for place in map(str, (folder, root, Path.cwd())):
        if place not in sys.path:
            sys.path.append(place)
    return runpy.run_path(str(path))
