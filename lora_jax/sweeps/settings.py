"""The cells of `lj.sweep`: dicts of settings, checked and turned into methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule
from lora_jax.methods import LoRA, Method, UniLoRA
from lora_jax.methods.registry import METHODS, all_settings, settings_of
from lora_jax.settings import SETTINGS, OptimizerSettings, Settings
from lora_jax.settings.fields import check_range
from lora_jax.sweeps.cells import read_tune, value_text
from lora_jax.train.cell import Cell

# Settings of a rule that a table shows even where they have their default.
SHOWN = ("targets", "rank", "alpha", "dropout", "init")
OF_ANY = ("name", "method", "train", "rows", "lr", "weight_decay", "seed", "head_lr", "lr_by_path")
RATES = {"head_lr": 0.0, "lr_by_path": ()}


def read_cells(
    cells: Sequence[Mapping[str, Any]],
    *,
    axes: Any = None,
    aliases: Any = None,
    optimizer: OptimizerSettings | None = None,
) -> list[Cell]:
    """The cells in order; one that no method can be made of says so in `refused`.

    `optimizer` has what they share. Raises `RequestError` for what is wrong with the sweep as a
    whole: no cells, or two that were given one name or the same settings.
    """
    found: dict[str, Cell] = {}
    seen: dict[str, str] = {}
    for number, given in enumerate(cells):
        name = _name_of(given, number, found)
        same = repr(sorted((k, repr(v)) for k, v in given.items() if k != "name"))
        if same in seen:
            raise RequestError(
                f"cells {seen[same]!r} and {name!r} have the same settings; remove one, or give "
                "them different seeds"
            )
        seen[same] = name
        found[name] = _read_cell(name, given, axes, aliases, optimizer or OptimizerSettings())
    if not found:
        raise RequestError("cells is empty; a sweep needs at least one")
    return list(found.values())


def _read_cell(
    name: str, given: Mapping[str, Any], axes: Any, aliases: Any, optimizer: OptimizerSettings
) -> Cell:
    """One cell; where a setting is wrong, `refused` says why and what was given stands as it is."""
    try:
        known = (*OF_ANY, *all_settings())
        for key in given:
            if key not in known:
                near = trees.nearest(str(key), known)
                raise RequestError(f"cell {name!r} has an unknown setting {key!r}; {near}")
        lr = float(_checked(name, "optimizer.lr", given.get("lr")))
        decay = float(_checked(name, "optimizer.weight_decay", given.get("weight_decay", 0.0)))
        rates = {
            key: _checked(name, f"optimizer.{key}", given.get(key, default))
            for key, default in RATES.items()
        }
        seed = _checked(name, "seed", given.get("seed", 0))
        method = _method_of(given, axes, aliases)
    except RequestError as error:
        as_given = {key: value for key, value in given.items() if key != "name"}
        return Cell(name, Settings(), refused=error, shown=as_given)
    own = dataclasses.replace(optimizer, lr=lr, weight_decay=decay, **rates)
    shown = _in_full(given) | {"lr": lr, "weight_decay": decay, "seed": seed}
    return Cell(name, Settings(seed=seed, optimizer=own), method, shown=shown)


def tuned_cells(
    cells: Sequence[Mapping[str, Any]], tune: tuple[str, Sequence[Any]] | None
) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Each cell once for each value of a setting, `tune=(setting, values)`; and `{name: group}`.

    A group are the cells that differ in that setting alone. Raises `RequestError` for a setting
    that a cell gives itself, or fewer than two values.
    """
    if tune is None:
        return list(cells), {}
    key, values = read_tune(tune)
    expanded, groups = [], {}
    for number, cell in enumerate(cells):
        if key in cell:
            raise RequestError(
                f"cell {number} gives {key}={cell[key]!r}, which tune varies; give it in one place"
            )
        group = _name_of(cell, number, set(groups.values()))
        if group in groups.values():
            raise RequestError(f"two cells are named {group!r}; give each a name of its own")
        for value in values:
            name = f"{group}-{key}{value_text(value)}"
            expanded.append({**cell, key: value, "name": name})
            groups[name] = group
    return expanded, groups


def _method_of(given: Mapping[str, Any], axes, aliases) -> Method:
    kind = given.get("method", "lora")
    if isinstance(kind, Method):
        useless = [key for key in (*all_settings(), "train", "rows") if key in given]
        if useless:
            raise RequestError(
                f"{useless[0]!r} is given with a ready method, which has its own; remove it, or "
                "name the method instead"
            )
        return kind
    if not isinstance(kind, str) or kind not in METHODS:
        near = trees.nearest(str(kind), METHODS)
        raise RequestError(f"method {kind!r} is no name and no Method made ready; {near}")
    own = settings_of(METHODS[kind])
    useless = next((key for key in all_settings() if key in given and key not in own), None)
    if useless is not None:
        raise RequestError(f"{useless!r} means nothing to method {kind!r}; remove it")
    settings = {key: given[key] for key in (*own, "train", "rows") if key in given}
    if issubclass(METHODS[kind], LoRA | UniLoRA):
        settings["axes"] = axes
    return METHODS[kind](aliases=aliases, **settings)


def _checked(name: str, key: str, value: Any) -> Any:
    try:
        return check_range(key.rpartition(".")[2], value, SETTINGS[key])
    except RequestError as error:
        raise RequestError(f"cell {name!r}: {error}") from None


def _in_full(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of those that count."""
    method = given.get("method", "lora")
    full = {"method": method if isinstance(method, str) else type(method).__name__}
    if isinstance(method, str) and "rules" not in given:
        own = (Rule, METHODS[method])
        fields = {field.name: field.default for kind in own for field in dataclasses.fields(kind)}
        shown = [key for key in settings_of(METHODS[method]) if key in SHOWN]
        full |= {key: given.get(key, fields[key]) for key in shown}
    return full | {key: value for key, value in given.items() if key not in ("name", "method")}


def _name_of(given: Mapping[str, Any], number: int, taken) -> str:
    """The name given, or a readable one made of the settings: `lora-w1-rank4-lr0.001`."""
    if given.get("name"):
        name = str(given["name"])
        if name in taken:
            raise RequestError(f"two cells are named {name!r}; give each a name of its own")
        return name
    method = given.get("method", "lora")
    parts = [method if isinstance(method, str) else type(method).__name__]
    for key, value in given.items():
        if key == "targets":
            parts.append(value if isinstance(value, str) else "+".join(map(str, value)))
        elif key not in ("method", "rules"):
            parts.append(f"{key}{value}")
    name = "-".join(parts)
    return name if name not in taken else f"{name}-cell{number}"
