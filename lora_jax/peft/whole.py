"""What a PEFT folder holds whole: heads, norms, biases, and tables next to the adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.safetensors import read_metadata, read_tensors
from lora_jax.models.checkpoint import HEAD_ENTRIES, HEAD_FILE
from lora_jax.models.functional import flatten
from lora_jax.models.hf_names import params_from_tensors
from lora_jax.models.model import Model
from lora_jax.peft.assemble import cast
from lora_jax.peft.config import CONFIG, PeftConfig
from lora_jax.peft.keys import TENSORS, Keys
from lora_jax.peft.names import EMBEDDING, UNTIE, Names, View
from lora_jax.peft.save import HEAD_KEY
from lora_jax.peft.split import has_pooled_head


@dataclasses.dataclass(frozen=True)
class Reading:
    """An adapter's folder as it is read for a model; `view` says how its files write names."""

    folder: Path
    model: Model
    config: PeftConfig
    keys: Keys
    names: Names
    view: View

    @property
    def file(self) -> Path:
        """The file of the tensors."""
        return self.folder / TENSORS

    @functools.cached_property
    def flat(self) -> dict[str, Any]:
        """The model's parameters by path."""
        return flatten(self.model.params)


def with_stored_tables(reading: Reading) -> Reading:
    """What to make of tables that PEFT stores with an adapter without a word in the config.

    It does so with `save_embedding_layers`, or a vocabulary that was resized. Those of the base are
    set aside; others are modules saved whole, as they are there.
    """
    config, keys, names, view = reading.config, reading.keys, reading.names, reading.view
    whole, bases, saved = dict(keys.whole), dict(keys.bases), list(config.modules_to_save)
    for there in list(whole):
        module = names.modules.get(view.here(there.removesuffix(".weight")))
        if module is None or not (module.kind == EMBEDDING or module.is_output):
            continue
        if not there.endswith(".weight") or config.saves(view.there(module.name)):
            continue
        own = module.entry.in_file(np.asarray(reading.flat[module.entry.path]))
        if own.shape == whole[there].shape and not np.array_equal(own, whole[there]):
            saved.append(view.there(module.name))
        else:
            bases[there.removesuffix(".weight")] = whole.pop(there)
    config = dataclasses.replace(config, modules_to_save=tuple(saved))
    keys = dataclasses.replace(keys, whole=whole, bases=bases)
    return dataclasses.replace(reading, config=config, keys=keys)


def check_bases(reading: Reading) -> None:
    """The frozen weights that come with an embedding's adapter must be this model's."""
    for there, array in reading.keys.bases.items():
        module = reading.names.modules.get(reading.view.here(there))
        if module is None:
            raise RequestError(
                f"{reading.file} holds the weight of {there!r}, which this model does not have"
            )
        own = module.entry.in_file(np.asarray(reading.flat[module.entry.path]))
        if own.shape != array.shape:
            raise RequestError(
                f"{reading.file} was made for an embedding or head {array.shape} at "
                f"{there!r}, this model has {own.shape}; load the base whose vocabulary was "
                "resized in the same way"
            )
        coarse = min(own.dtype, array.dtype, key=lambda dtype: dtype.itemsize)
        if not np.array_equal(own.astype(coarse), array.astype(coarse)):
            raise RequestError(
                f"{reading.file} was made for other weights of {there!r} than this model has; "
                "load the model that the adapter was made for"
            )


def whole_values(reading: Reading) -> dict[str, Any]:
    """`{path: array}` of the parameters that the file holds whole: heads, norms, biases."""
    config, keys, names, view = reading.config, reading.keys, reading.names, reading.view
    adapted = {view.here(name) for name in keys.parts}
    values: dict[str, Any] = {}
    given = {view.here(name): array for name, array in keys.whole.items()}
    for name, entry in names.tensors.items():
        module = name.rpartition(".")[0]
        is_bias = name.endswith(".bias")
        is_saved = config.saves(view.there(module))
        is_bias_saved = is_bias and (
            config.bias == "all" or (config.bias == "lora_only" and module in adapted)
        )
        if not (is_saved or is_bias_saved):
            continue
        if name not in given:
            raise RequestError(
                f"{reading.file} lacks {view.there(name)!r}, which {CONFIG} says was trained "
                f"(modules_to_save={list(config.modules_to_save)}, bias={config.bias!r})"
            )
        if is_saved and module in names.modules and names.modules[module].is_tied:
            raise RequestError(
                f"{reading.folder} trains {module!r} whole, apart from the table that this model "
                f"ties it to; {UNTIE}"
            )
        array = given.pop(name)
        old = reading.flat[entry.path]
        shape = tuple(old.shape) if entry.index is None else tuple(old.shape[1:])
        stored = shape[::-1] if entry.is_transposed else shape
        if array.shape != stored:
            raise RequestError(
                f"{reading.file}: {view.there(name)!r} is {array.shape}, this model has "
                f"{stored}; load the model that the adapter was made for"
            )
        array = array.T if entry.is_transposed else array
        array = cast(array, old.dtype, f"{reading.file}: {view.there(name)!r}")
        if entry.index is None:
            values[entry.path] = jnp.array(array)
            continue
        if entry.path not in values:
            values[entry.path] = np.array(old)
        values[entry.path][entry.index] = array
    if given:
        extra = sorted(given)
        head = names.modules.get("lm_head")
        if "lm_head.weight" in given and head is not None and head.is_tied:
            raise RequestError(
                f"{reading.file} holds an {view.there('lm_head.weight')!r} of its own, which "
                f"this model ties to its table; {UNTIE}"
            )
        raise RequestError(
            f"{reading.file} holds {view.there(extra[0])!r}{and_more(extra)}, which is no "
            f"parameter of this model that {CONFIG} says was trained (modules_to_save="
            f"{list(config.modules_to_save)}, bias={config.bias!r}); load the model it was made "
            "for, with its head"
        )
    return {path: jnp.asarray(value) for path, value in values.items()}


def pooled_head(reading: Reading) -> dict[str, Any]:
    """The head in a file of its own, which `save_adapter` writes if the head uses a pooling."""
    folder, flat = reading.folder, reading.flat
    path = folder / HEAD_FILE
    if not path.is_file():
        if HEAD_KEY in read_metadata(reading.file):
            raise RequestError(
                f"{folder} lacks {HEAD_FILE}, which was written with its other files; copy it"
            )
        return {}
    if not has_pooled_head(reading.model):
        raise RequestError(
            f"{folder} holds {HEAD_FILE}, a head for pooled hidden states, but this model has "
            "none; load it with head='classification'"
        )
    head = params_from_tensors(read_tensors(path), HEAD_ENTRIES, flat, ignored=(), place=str(path))
    return {p: jnp.array(cast(x, flat[p].dtype, f"{path}: {p!r}")) for p, x in head.items()}


def and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
