"""`save_model`: a folder that `load_model`, transformers and sentence-transformers open."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.formats.atomic import atomic_folder, write_json, write_text
from lora_jax.formats.safetensors import write_tensors
from lora_jax.models.checkpoint import HEAD_ENTRIES, HEAD_FILE
from lora_jax.models.families import family_of
from lora_jax.models.functional import flatten
from lora_jax.models.hf_names import tensors_from_params
from lora_jax.models.model import Model
from lora_jax.models.pooling import pooling_files


def save_model(folder: str | os.PathLike, model: Model, params: Mapping[str, Any]) -> None:
    """Writes `params` (a whole plain tree, as `method.merge` gives it) as a new model folder.

    The encoder goes to model.safetensors under transformers' names, a classification head to
    head.safetensors (`head.weight` (num_labels, D), `head.bias`), each in its own dtype; beside
    them config.json, tokenizer.json and the pooling. The folder appears whole, by a rename, or not
    at all. Raises `RequestError` if it exists or `params` are not the model's.
    """
    flat = _checked(model, params)
    entries = family_of(model.config).entries(model.config)
    dtype = flat[entries[0].path].dtype
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", model.config.to_json() | {"torch_dtype": str(dtype)})
        write_tensors(temporary / "model.safetensors", tensors_from_params(flat, entries))
        write_text(temporary / "tokenizer.json", model.tokenizer.to_str(pretty=True))
        if model.head is not None:
            write_tensors(temporary / HEAD_FILE, tensors_from_params(flat, HEAD_ENTRIES))
        for name, value in pooling_files(model.pooling, model.config.hidden_size).items():
            write_json(temporary / name, value)


def _checked(model: Model, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    expected, given = flatten(model.params), flatten(params)
    for path in sorted(expected.keys() ^ given.keys()):
        side = "lack" if path in expected else "hold"
        raise RequestError(f"params {side} '{path}', unlike model {model.name}; pass a whole tree")
    for path, array in expected.items():
        if not hasattr(given[path], "shape") or given[path].shape != array.shape:
            found = getattr(given[path], "shape", type(given[path]).__name__)
            raise RequestError(
                f"params hold {found} at '{path}', model {model.name} has {array.shape} there; "
                "merge adapters first (method.merge)"
            )
    return {path: np.asarray(array) for path, array in given.items()}
