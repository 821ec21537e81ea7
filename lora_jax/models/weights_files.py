"""A folder's weights, in one `.safetensors` file or several, as one lazy mapping of names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.lazy import LazyMapping
from lora_jax.io.safetensors import LazyTensors
from lora_jax.models.config_fields import read_json
from lora_jax.models.sources import is_plain_name

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_weights(folder: Path) -> tuple[Mapping[str, np.ndarray], Path]:
    """`(tensors, file)`: each tensor is read when asked for; `file` is what errors should name.

    Nothing but `.safetensors` is ever opened. Raises `RequestError` for no weights, weights in
    pickles alone, a damaged file, or an index that does not agree with its files.
    """
    if (folder / ONE_FILE).is_file():
        return LazyTensors(folder / ONE_FILE), folder / ONE_FILE
    if (folder / INDEX).is_file():
        return _open_shards(folder), folder / INDEX
    advice = "a model folder holds config.json, model.safetensors and tokenizer.json"
    if any(folder.glob("pytorch_model*.bin")):
        advice = "pickled weights are not read; save the model with transformers as safetensors"
    raise RequestError(f"{folder} lacks {ONE_FILE}; {advice}")


def _open_shards(folder: Path) -> Mapping[str, np.ndarray]:
    place = folder / INDEX
    weight_map = read_json(place, kind=dict).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{place} has no weight_map; download the model's index again")
    for tensor, file in weight_map.items():
        if not is_plain_name(file):
            raise RequestError(
                f"{place} places {tensor} in {file!r}, which is not the name of a file in the same "
                "folder; download the model's index again"
            )
    shards = {file: LazyTensors(folder / file) for file in sorted(set(weight_map.values()))}
    for tensor, file in weight_map.items():
        if tensor not in shards[file]:
            raise RequestError(
                f"{place} places {tensor} in {file}, which does not hold it; download the model's "
                "files again"
            )
    for file, shard in shards.items():
        stray = [tensor for tensor in shard if weight_map.get(tensor) != file]
        if stray:
            raise RequestError(
                f"{folder / file} holds {stray[0]}, which {INDEX} does not place there; download "
                "the model's files again"
            )
    return renamed({tensor: (shards[file], tensor) for tensor, file in weight_map.items()})


def renamed(
    places: Mapping[str, tuple[Mapping[str, np.ndarray], str]],
) -> Mapping[str, np.ndarray]:
    """`{name: (mapping, its name there)}` as one mapping of tensors, as lazy as those beneath."""

    def read(name: str) -> np.ndarray:
        tensors, there = places[name]
        return tensors[there]

    return LazyMapping(places, read)
