"""The cells of a sweep: what `sweep_NAME(add)` beside a config's `get_config` adds."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import nearest
from lora_jax.train.workdir import flat_config

PREFIX = "sweep_"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: its name in the workdir and its settings, in full."""

    name: str
    config: ConfigDict


def read_sweep(path: str, sweep: str, config: ConfigDict) -> list[Cell]:
    """Calls `sweep_<sweep>(add)` of the config file `path`; each `add` is `config` overridden.

    `add(name, **{"method.rank": 4, "seed": 1})` adds a cell. Raises `RequestError` for a sweep the
    file does not have, a name given twice, or a setting the config does not know.
    """
    functions = runpy.run_path(str(Path(path)))
    known = [name.removeprefix(PREFIX) for name in functions if name.startswith(PREFIX)]
    if sweep not in known:
        raise RequestError(f"{path} has no sweep {sweep!r}; {nearest(sweep, known)}")
    cells: dict[str, Cell] = {}

    def add(name: str, **overrides: Any) -> None:
        if name in cells:
            raise RequestError(f"sweep {sweep!r} adds the cell {name!r} twice; name them apart")
        if not name or name != Path(name).name or name.startswith("."):
            raise RequestError(f"cell name {name!r} cannot be a folder's; use letters, digits, -")
        cells[name] = Cell(name, overridden(config, overrides))

    functions[PREFIX + sweep](add)
    if not cells:
        raise RequestError(f"sweep {sweep!r} of {path} adds no cell")
    return list(cells.values())


def overridden(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with dotted settings replaced; types must agree."""
    known = flat_config(config.to_dict())
    for key in overrides:
        if key not in known:
            raise RequestError(f"the config has no setting {key!r}; {nearest(key, known)}")
    copy = config.copy_and_resolve_references()
    try:
        copy.update_from_flattened_dict(dict(overrides))
    except TypeError as error:
        raise RequestError(f"a setting has another type than the config's: {error}") from error
    return copy
