"""The tensors of an `adapter_model.safetensors`, sorted by what each of them is."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.safetensors import read_tensors

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What ends the name of each tensor of an adapter, and which part it is.
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_PART = re.compile(r"(?P<module>.+)\.(?P<part>" + "|".join(map(re.escape, _PARTS)) + ")")
# As a model in memory has them: with the adapter's name, which save_pretrained leaves out.
_NAMED = re.compile(
    r"(?P<start>.+\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?P<name>[^.]+)(?P<end>\.weight)?"
)
_BASE = re.compile(r"(?P<module>.+)\.base_layer\.(?P<what>weight|bias)")


@dataclasses.dataclass(frozen=True)
class Keys:
    """`parts` is `{module: {"A" | "B" | "magnitude": array}}`; `whole` `{tensor: array}` are
    parameters saved as they are; `bases` `{module: array}` the frozen weights beneath adapters,
    which PEFT stores with those of embeddings; `tables` the modules whose factors have the names
    that PEFT gives to those of embeddings.
    """

    parts: Mapping[str, Mapping[str, np.ndarray]]
    whole: Mapping[str, np.ndarray]
    bases: Mapping[str, np.ndarray]
    tables: frozenset[str] = frozenset()

    def without(self, modules: set[str]) -> Keys:
        """The keys except those of `modules`."""
        return Keys(
            {name: x for name, x in self.parts.items() if name not in modules},
            {name: x for name, x in self.whole.items() if name.rpartition(".")[0] not in modules},
            {name: x for name, x in self.bases.items() if name not in modules},
            self.tables - modules,
        )


def read_keys(folder: Path) -> Keys:
    """Reads the file. Raises `RequestError` for a missing or damaged file, keys of another naming,
    or values that are not finite floats.
    """
    path = folder / TENSORS
    if not path.is_file() and any(folder.glob("adapter_model.bin")):
        raise RequestError(
            f"{folder} holds its weights as a pickle, which is never opened; save the adapter with "
            "peft as safetensors"
        )
    parts: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    bases: dict[str, np.ndarray] = {}
    wrapped: dict[str, np.ndarray] = {}
    tables: set[str] = set()
    tensors = read_tensors(path)
    adapter = _adapter_in(path, tensors)
    for key, array in tensors.items():
        if not key.startswith(PREFIX):
            raise RequestError(
                f"{path} holds {key!r}, which does not begin with {PREFIX!r}; it is no adapter of "
                "peft's naming"
            )
        name = _plain_key(key.removeprefix(PREFIX), adapter)
        _check_values(path, key, name, array)
        if found := _PART.fullmatch(name):
            module, part = found["module"], _PARTS[found["part"]]
            if part in parts.setdefault(module, {}):
                raise RequestError(
                    f"{path} holds two tensors for {part} of {module!r}: {key!r}, too"
                )
            parts[module][part] = array
            if found["part"] == "lora_embedding_A":
                tables.add(module)
        elif found := _BASE.fullmatch(name):
            if found["what"] == "bias":
                whole[f"{found['module']}.bias"] = array
            else:
                bases[found["module"]] = array
        elif ".original_module." not in name:  # what a saved module was before: not in use
            wrapped[name] = array
    for name, array in wrapped.items():
        plain = _unwrapped(name, wrapped)
        if plain in whole and not np.array_equal(whole[plain], array):
            raise RequestError(f"{path} holds two different tensors for {plain!r}: {name!r}, too")
        whole[plain] = array
    return Keys(parts, whole, bases, frozenset(tables))


def _plain_key(name: str, adapter: str | None) -> str:
    """A key without the adapter's name: "….lora_A.default.weight" as "….lora_A.weight"."""
    found = None if adapter is None else _NAMED.fullmatch(name)
    if found is None or found["name"] != adapter:
        return name
    return f"{found['start']}{found['end'] or ''}"


def _adapter_in(path: Path, keys: Iterable[str]) -> str | None:
    """The adapter that the keys of a raw state dict name; None for those of save_pretrained."""
    named = {found["name"] for key in keys if (found := _NAMED.fullmatch(key))}
    names = sorted(named - {"weight"})
    if len(names) > 1:
        raise RequestError(
            f"{path} is a raw state dict of the adapters {', '.join(names)}; save one of them with "
            "peft's save_pretrained(…, selected_adapters=[…])"
        )
    return names[0] if names else None


def _unwrapped(name: str, names: Mapping[str, np.ndarray]) -> str:
    """A saved module's tensor without PEFT's wrapper, which some keys have next to the plain one,
    with or without the adapter's name: "classifier.modules_to_save.default.dense.bias"."""
    if ".modules_to_save." not in name:
        return name
    short = re.sub(r"\.modules_to_save\.", ".", name)
    shorter = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return shorter if shorter != name and shorter in names else short


def check_values(path: os.PathLike, key: str, array: np.ndarray) -> None:
    """Raises `RequestError` for a tensor that is not of finite floats."""
    # bfloat16 is no kind of NumPy's own.
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise RequestError(f"{path}: {key} holds {array.dtype}, but adapters are floating point")
    if not np.isfinite(array).all():
        raise RequestError(f"{path}: {key} holds NaN or infinity; the training had diverged")


def _check_values(path: Path, key: str, name: str, array: np.ndarray) -> None:
    check_values(path, key, array)
    if name.endswith(".alpha") and array.size == 1:
        raise RequestError(
            f"{path} holds {key!r}, an alpha as kohya's scripts store it; peft keeps it in "
            "adapter_config.json (lora_alpha, alpha_pattern): write it there and remove the tensor"
        )
