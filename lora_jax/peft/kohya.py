"""Adapters in the files of kohya's scripts (sd-scripts) as factors: one file per adapter.

A module has `NAME.lora_down.weight` (r, in), `NAME.lora_up.weight` (out, r) and `NAME.alpha`, a
number; ΔW = alpha / r · up @ down, and alpha is r where the file has none. Names are those of the
model's modules with underscores for dots ("lora_unet_…", "lora_te1_…"). Convolutions of one point
are matrices; larger ones are left out and named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.io.safetensors import read_tensors
from lora_jax.peft.factors import AdapterFactors, Factors, layer_order, plain_text
from lora_jax.peft.keys import PREFIX, check_values

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
_SHORT = {"lora_down.weight": "down", "lora_up.weight": "up"}


def is_file(path: str | os.PathLike) -> bool:
    """Whether the path is a single file, as kohya's scripts write an adapter."""
    return at_home(path).is_file()


def read_kohya(path: str | os.PathLike) -> AdapterFactors:
    """Reads the factors of one file, with the scale alpha / r of each module.

    Raises:
      RequestError: the file is missing, damaged or of another kind, a module lacks a factor, shapes
        do not fit, or a value is not finite.
    """
    path = at_home(path)
    modules = _modules_in(path, read_tensors(path))
    factors, skipped = {}, []
    for module, parts in sorted(modules.items(), key=_block_order):
        name = plain_text(module)
        if (found := _factors(f"{path}: {name!r}", parts)) is None:
            skipped.append(name)
        else:
            factors[name] = found
    if not factors:
        raise RequestError(
            f"{path} adapts no matrix ({len(skipped)} convolutions are not analysed); there is "
            "nothing to do"
        )
    return AdapterFactors(
        name=plain_text(path.stem),
        factors=factors,
        is_dora=any("dora_scale" in parts for parts in modules.values()),
        skipped=tuple(skipped),
    )


def _block_order(item: tuple[str, object]) -> list[tuple[int, str]]:
    return layer_order((item[0].replace("_", "."), None))


def _modules_in(path: os.PathLike, tensors: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """`{module: {"down" | "up" | "alpha" | "dora_scale": array}}`."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        found = _PART.fullmatch(key)
        if found is None:
            hint = "give an adapter as kohya's scripts write it (NAME.lora_down.weight, …)"
            if key.startswith(PREFIX):
                hint = "it is peft's naming: give the folder, with its adapter_config.json"
            raise RequestError(f"{path} holds {plain_text(key)!r}; {hint}")
        check_values(path, key, array)
        part = _SHORT.get(found["part"], found["part"])
        modules.setdefault(found["module"], {})[part] = array
    return modules


def _factors(place: str, parts: Mapping[str, np.ndarray]) -> Factors | None:
    """One module's factors; None for a convolution of more than one point."""
    for part, name in (("down", "lora_down"), ("up", "lora_up")):
        if part not in parts:
            raise RequestError(f"{place} lacks its {name}; copy the adapter again")
    down, up = parts["down"], parts["up"]
    if down.ndim == up.ndim == 4 and down.shape[2:] == (1, 1):
        down, up = down[:, :, 0, 0], up[:, :, 0, 0]
    if down.ndim == 4:
        return None
    fits = down.ndim == up.ndim == 2 and down.shape[:1] == up.shape[1:] and down.size > 0
    if not fits:
        raise RequestError(
            f"{place} has a lora_down of {down.shape} and a lora_up of {up.shape}, which are no "
            "factors (r, in) and (out, r) of one matrix; copy the adapter again"
        )
    rank = down.shape[0]
    alpha = parts.get("alpha", np.array(float(rank)))
    if alpha.size != 1 or not float(alpha.reshape(())) > 0:
        raise RequestError(
            f"{place} has an alpha of {alpha.tolist()!r}, which must be one positive number; copy "
            "the adapter again"
        )
    return Factors(down.T, up.T, float(alpha.reshape(())) / rank)
