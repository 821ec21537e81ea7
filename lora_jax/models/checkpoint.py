"""What a model folder holds, read and checked: config, weights, tokenizer, pooling, head."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from lora_jax.core.errors import RequestError
from lora_jax.formats.safetensors import read_tensors
from lora_jax.models.config_fields import read_json
from lora_jax.models.families import Family, find_family
from lora_jax.models.functional import functional
from lora_jax.models.hf_names import Entry, params_from_tensors
from lora_jax.models.pooling import read_pooling
from lora_jax.models.tokenizer import read_tokenizer

# A head trained here lies beside the encoder in a file of its own, in torch's layout, so that other
# programs open model.safetensors as the plain encoder it is.
HEAD_FILE = "head.safetensors"
HEAD_ENTRIES = (
    Entry("head.weight", "head/kernel", is_transposed=True),
    Entry("head.bias", "head/bias"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as stored: `params` and `head` are `{path: NumPy array}`, kernels (in, out)."""

    name: str
    family: Family
    config: Any
    params: dict[str, np.ndarray]
    tokenizer: Tokenizer
    pooling: str
    head: dict[str, np.ndarray] | None = None


def read_checkpoint(folder: str | os.PathLike, name: str) -> Checkpoint:
    """Reads a Hugging Face folder; raises `RequestError` for anything missing or inconsistent."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}; check the path")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / file).is_file():
            raise RequestError(f"{folder} lacks {file}; {_remedy(folder, file)}")
    place = str(folder / "config.json")
    raw = read_json(place, kind=dict)
    family = find_family(raw.get("model_type"), place)
    config = family.config.from_json(raw, place)
    # The tokenizer before the weights: of two errors, the one that is found sooner.
    tokenizer = read_tokenizer(
        folder / "tokenizer.json", vocab_size=config.vocab_size, pad_token_id=config.pad_token_id
    )
    shapes, _ = functional(lambda: family.module(config, rngs=nnx.Rngs(0)))
    path = folder / "model.safetensors"
    params = params_from_tensors(
        family.canonical(read_tensors(path)),
        family.entries(config),
        shapes,
        ignored=family.ignored,
        place=str(path),
    )
    head = _read_head(folder / HEAD_FILE, config.hidden_size)
    return Checkpoint(name, family, config, params, tokenizer, read_pooling(folder), head)


def _read_head(path: Path, hidden_size: int) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    labels = len(tensors["head.bias"]) if np.ndim(tensors.get("head.bias")) == 1 else 1
    shapes = {
        "head/kernel": np.empty((hidden_size, labels)),
        "head/bias": np.empty((labels,)),
    }
    return params_from_tensors(tensors, HEAD_ENTRIES, shapes, ignored=(), place=str(path))


def _remedy(folder: Path, file: str) -> str:
    if file == "model.safetensors":
        if (folder / "model.safetensors.index.json").is_file():
            return "weights in several files are not read; save them as one with transformers"
        if (folder / "pytorch_model.bin").is_file():
            return "pickled weights are not read; save the model with transformers as safetensors"
    return "a model folder holds config.json, model.safetensors and tokenizer.json"
