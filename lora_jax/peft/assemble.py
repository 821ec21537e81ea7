"""From PEFT's adapters, one a module, to this project's, one a parameter."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import Stored
from lora_jax.methods import DoRA, RsLoRA
from lora_jax.peft.names import Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One module's adapter: a (in, r), b (r, out), and DoRA's magnitude (out,) or None."""

    module: Module
    rank: int
    alpha: float
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    place: str


@dataclasses.dataclass(frozen=True)
class Assembled:
    """The adapter of one parameter: `arrays` as a method's `trainable` has them."""

    path: str
    rank: int
    alpha: float
    arrays: dict[str, np.ndarray]
    is_tied: bool


def assemble(parts: Sequence[Part], flat: Mapping[str, Any], *, kind: type) -> list[Assembled]:
    """One adapter a parameter, its shapes checked; layers of a stacked parameter brought together.

    Ranks are padded with zeros to the widest of a stack, and scales that differ within it move into
    b. Raises `RequestError` for shapes that are not this model's.
    """
    groups: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        groups[part.module.entry.path].append(part)
    return [_assembled(path, group, flat[path], kind) for path, group in groups.items()]


def _assembled(path: str, group: list[Part], kernel: Any, kind: type) -> Assembled:
    of_one = tuple(kernel.shape) if group[0].module.entry.index is None else tuple(kernel.shape[1:])
    wide = np.promote_types(np.float32, np.float64 if kernel.dtype == np.float64 else np.float32)
    for part in group:
        found = (part.a.shape[0], part.b.shape[1])
        if found != of_one or (part.magnitude is not None and part.magnitude.shape != of_one[1:]):
            raise RequestError(
                f"{part.place} is an adapter of a weight with (inputs, outputs) {found}, this "
                f"model has {of_one} there; load the model that the adapter was made for"
            )
    first = group[0]
    if first.module.entry.index is None:
        arrays = {"a": first.a, "b": first.b}
        arrays |= {} if first.magnitude is None else {"magnitude": first.magnitude}
        arrays = {name: cast(x, wide, f"{first.place}: {name}") for name, x in arrays.items()}
        return Assembled(path, first.rank, first.alpha, arrays, first.module.is_tied)
    return _stacked(path, group, kernel, kind, wide)


def cast(array: Any, dtype: Any, place: str, scale: float = 1.0) -> np.ndarray:
    """`array · scale` in another dtype. Raises `RequestError` if that makes an infinity."""
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.asarray(array).astype(dtype) * dtype.type(scale)
    if not np.isfinite(found).all():
        raise RequestError(
            f"{place} holds numbers that {dtype.name} cannot (up to "
            f"{np.abs(np.asarray(array).astype(np.float64)).max():.3g}); "
            "the training had diverged, or choose a wider dtype"
        )
    return found


def _stacked(path: str, group: list[Part], kernel: Any, kind: type, wide) -> Assembled:
    layers, inputs, outputs = kernel.shape
    rank = max(part.rank for part in group)
    alphas = {part.alpha for part in group}
    is_even = len({part.rank for part in group}) == 1 and len(alphas) == 1
    power = 0.5 if kind is RsLoRA else 1.0
    # One scale for all layers: their own where they agree, else 1, theirs being in b.
    alpha = alphas.pop() if is_even else rank**power
    a, b = np.zeros((layers, inputs, rank), wide), np.zeros((layers, rank, outputs), wide)
    arrays = {"a": a, "b": b}
    if kind is DoRA:
        # Of layers without an adapter: their own norm, which leaves them as they are.
        norms = [_norms_of(kernel, layer) for layer in range(layers)]
        arrays["magnitude"] = np.stack(norms).astype(wide)
    for part in group:
        place = part.module.entry.index
        scale = 1.0 if is_even else part.alpha / part.rank**power
        a[place, :, : part.rank] = cast(part.a, wide, f"{part.place}: a")
        b[place, : part.rank] = cast(part.b, wide, f"{part.place}: b", scale)
        if part.magnitude is not None:
            arrays["magnitude"][place] = cast(part.magnitude, wide, f"{part.place}: magnitude")
    return Assembled(path, rank, float(alpha), arrays, False)


def _norms_of(kernel: Any, layer: int) -> np.ndarray:
    """The norms over inputs of one layer's kernel, which may be stored in four bits."""
    one = kernel.layer(layer).dequantize() if isinstance(kernel, Stored) else kernel[layer]
    return np.linalg.norm(np.asarray(one).astype(np.float64), axis=0)


def pattern_of_paths(paths: Sequence[str], everything: Mapping[str, Any]) -> str | tuple[str, ...]:
    """A regular expression that matches just these of all paths: "layers/\\d+/…" where it can."""
    templates = sorted({_template(path) for path in paths})
    matched = {path for path in everything if any(re.fullmatch(t, path) for t in templates)}
    if matched == set(paths):
        return templates[0] if len(templates) == 1 else tuple(templates)
    return tuple(re.escape(path) for path in paths)


def _template(path: str) -> str:
    return "/".join(r"\d+" if key.isdecimal() else re.escape(key) for key in path.split("/"))
