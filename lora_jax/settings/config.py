"""Config files' `ConfigDict`s: made from the settings that differ, and overridden."""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.settings.schema import SECTIONS, check_method_has

PACKAGE = Path(__file__).resolve().parents[1]


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


def shipped_configs() -> dict[str, Path]:
    """`{name: file}` of the configs that come with the package: "what_rank", "paper/e2e_gpt2", …"""
    folder = _shipped_folder()
    files = (file for file in sorted(folder.rglob("*.py")) if "def get_config" in file.read_text())
    return {str(file.relative_to(folder).with_suffix("")): file for file in files}


def _shipped_folder() -> Path:
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "experiments" / "configs"


def find_config(file: str | Path) -> Path:
    """A config's file: a path, or the name of a shipped one. Raises `RequestError`."""
    path = Path(file)
    if path.is_file():
        return path
    shipped = shipped_configs()
    # They were files of experiments/ once; commands with those paths are still around.
    name = str(file).removeprefix("experiments/").removesuffix(".py")
    if name not in shipped:
        raise RequestError(f"config file {str(file)!r} does not exist; {nearest(name, shipped)}")
    return shipped[name]


def run_file(file: str | Path) -> dict[str, Any]:
    """The names that a config file defines, executed afresh.

    It may import its neighbours (`from .shared import LORA`, or `import shared`), the package that
    it is part of, and what the working folder has. Raises `RequestError` if there is no such file.
    """
    path = find_config(file).resolve()
    root = path.parent
    while (root / "__init__.py").exists():
        root = root.parent
    for place in map(str, (path.parent, root, Path.cwd())):
        if place not in sys.path:
            sys.path.append(place)
    name = f"{_package_of(path.parent)}.{path.stem}"
    module = types.ModuleType(name)
    module.__file__, module.__package__ = str(path), name.rpartition(".")[0]
    # Dataclasses of a config look their module up by its name.
    sys.modules[name] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    finally:
        del sys.modules[name]
    return vars(module)


def _package_of(folder: Path) -> str:
    """The package that relative imports of a file in `folder` begin at, made if need be.

    Its name is the folder's own: two configs with a neighbour `shared` do not meet. What is not in
    the folder is looked for next to the shipped configs, so that a copy of one runs as it is.
    """
    if folder == PACKAGE:
        return PACKAGE.name
    if (folder / "__init__.py").exists():
        return f"{_package_of(folder.parent)}.{folder.name}"
    name = f"_config_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder), str(_shipped_folder())]
    return name
