"""The cells of `lj.sweep`: dicts of settings, checked and turned into methods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.methods import BitFit, FullFineTuning, HeadOnly, LoRA, Method

METHODS: Mapping[str, Callable[..., Method]] = {
    "lora": LoRA,
    "full": FullFineTuning,
    "bitfit": BitFit,
    "head": HeadOnly,
}
OF_LORA = ("targets", "rank", "alpha", "dropout", "init", "rules")
OF_ANY = ("name", "method", "train", "lr", "weight_decay", "seed")


@dataclasses.dataclass(frozen=True)
class CellSettings:
    """One cell: what it was given, and the method and rates that it means.

    `refused`, "" if all is well, says why no method could be made of it (`method` is None then).
    """

    name: str
    given: Mapping[str, Any]
    method: Method | None
    lr: float
    weight_decay: float
    seed: int
    refused: str = ""


def read_cells(
    cells: Sequence[Mapping[str, Any]], *, axes: Any = None, aliases: Any = None
) -> list[CellSettings]:
    """The cells in order; one that no method can be made of says so in `refused`.

    Raises `RequestError` for what is wrong with the sweep as a whole: an unknown setting, a missing
    learning rate, two cells of one name or with the same settings.
    """
    found, seen = [], {}
    for number, given in enumerate(cells):
        for key in given:
            if key not in (*OF_ANY, *OF_LORA):
                known = trees.nearest(key, (*OF_ANY, *OF_LORA))
                raise RequestError(f"cell {number} has an unknown setting {key!r}; {known}")
        name = str(given.get("name") or _name_of(given))
        same = repr(sorted((k, repr(v)) for k, v in given.items() if k != "name"))
        if same in seen:
            raise RequestError(
                f"cells {seen[same]!r} and {name!r} have the same settings; remove one, or give "
                "them different seeds"
            )
        if name in seen.values():
            raise RequestError(f"two cells are named {name!r}; give each a name of its own")
        seen[same] = name
        rates = {key: _rate(name, key, given) for key in ("lr", "weight_decay")}
        method, refused = None, ""
        try:
            method = _method_of(given, axes, aliases)
        except RequestError as error:
            refused = str(error)
        seed = int(given.get("seed", 0))
        found.append(CellSettings(name, dict(given), method, seed=seed, refused=refused, **rates))
    if not found:
        raise RequestError("cells is empty; a sweep needs at least one")
    return found


def _method_of(given: Mapping[str, Any], axes, aliases) -> Method:
    kind = given.get("method", "lora")
    if isinstance(kind, Method):
        return kind
    if kind not in METHODS:
        raise RequestError(f"method {kind!r} is unknown; {trees.nearest(kind, METHODS)}")
    settings = {"aliases": aliases}
    if "train" in given:
        settings["train"] = given["train"]
    if kind == "lora":
        settings |= {key: given[key] for key in OF_LORA if key in given}
        settings["axes"] = axes
    else:
        useless = next((key for key in OF_LORA if key in given), None)
        if useless is not None:
            raise RequestError(f"{useless!r} means nothing to method {kind!r}; remove it")
    return METHODS[kind](**settings)


def _rate(name: str, key: str, given: Mapping[str, Any]) -> float:
    value = given.get(key, 0.0 if key == "weight_decay" else None)
    good = isinstance(value, int | float) and math.isfinite(value) and value >= 0
    if not good:
        raise RequestError(f"cell {name!r}: {key} is {value!r}; it must be a number of at least 0")
    return float(value)


def _name_of(given: Mapping[str, Any]) -> str:
    """`lora-w1-rank4-lr0.001-seed0`: a readable name from the settings themselves."""
    parts = [str(given.get("method", "lora"))]
    for key, value in given.items():
        if key == "targets":
            parts.append(str(value))
        elif key not in ("method", "name", "train"):
            parts.append(f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}")
    return "-".join(parts)
