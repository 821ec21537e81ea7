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
    for key, value in (item for one in changes for item in one.items()):
        section, _, name = key.rpartition(".")
        with config.ignore_type():
            (config[section] if section else config)[name] = value
    return config


def put_settings(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Puts `{"section.key": value}` into a `ConfigDict`, of whatever type its value was before.

    Raises `RequestError` for a setting of methods that the config does not list and its method
    does not have.
    """
    own = [key.partition(".")[2] for key in values if key.startswith("method.")]
    listed = config.get("method") or {}
    new = [name for name in own if name not in listed]
    with config.unlocked(), config.ignore_type():
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            if section and section not in config:
                config[section] = ConfigDict()
            (config[section] if section else config)[name] = value
    if "name" in (config.get("method") or {}):
        for name in new:
            check_method_has(config.method.name, name)


def run_file(path: str | Path) -> dict[str, Any]:
    """The names that a config file defines, executed; it may import its neighbours."""
    add_neighbours(path)
    return runpy.run_path(str(path))


def add_neighbours(path: str | Path) -> None:
    """Lets the file at `path` import what is next to it, and the package that it is part of."""
    folder = Path(path).resolve().parent
    root = folder
    while (root / "__init__.py").exists():
        root = root.parent
    for place in map(str, (folder, root, Path.cwd())):
        if place not in sys.path:
            sys.path.append(place)
