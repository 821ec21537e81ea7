"""`save_model`: a folder that `load_model`, transformers and sentence-transformers open."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import atomic_folder, write_json, write_text
from lora_jax.io.bitsandbytes import quantization_config
from lora_jax.io.safetensors import write_tensors
from lora_jax.models.checkpoint import HEAD_ENTRIES, HEAD_FILE
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.functional import flatten
from lora_jax.models.hf_names import Entry, tensors_from_params
from lora_jax.models.model import Model
from lora_jax.models.pooling import FAMILY, pooling_files
from lora_jax.quant.weight import NF4Weight


def save_model(folder: str | os.PathLike, model: Model, params: Mapping[str, Any]) -> None:
    """Writes `params` as a new model folder.

    Weights go to model.safetensors under transformers' names, each in its own dtype: a decoder with
    its head, an encoder with a head of its family's own kind as the class for sequence
    classification. A head on another pooling goes to head.safetensors (`head.weight` (num_labels,
    D), `head.bias`) next to the plain encoder. Kernels in four bits are written as bitsandbytes has
    them, for transformers to open in four bits. With them config.json, tokenizer.json and the
    pooling. The folder appears whole, by a rename, or not at all.

    Args:
      folder: the folder to write; it must not exist yet.
      model: what `params` are of: its config, tokenizer and pooling are written too.
      params: a whole tree, as `method.merge` gives it.

    Raises:
      RequestError: `folder` exists, or `params` are not the model's.
    """
    flat = _checked(model, params)
    body, head = class_entries(model)
    entries = [*body, *head]
    config = model.config.to_json() | {"architectures": [_class_name(model, bool(head))]}
    config |= _task_fields(model)
    # transformers 4 reads the first, transformers 5 the second.
    dtype = str(flat[entries[0].path].dtype)
    config |= {"torch_dtype": dtype, "dtype": dtype}
    if stored := [leaf for leaf in flat.values() if isinstance(leaf, NF4Weight)]:
        config["quantization_config"] = quantization_config(stored, _plain_modules(entries, stored))
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_tensors(temporary / "model.safetensors", tensors_from_params(flat, entries))
        if model.stored_tokenizer is not None:
            text = model.tokenizer.to_str(pretty=True)
            write_text(temporary / "tokenizer.json", text)
        if model.head is not None and not head:
            write_tensors(temporary / HEAD_FILE, tensors_from_params(flat, HEAD_ENTRIES))
        if model.kind == CAUSAL_LM and model.eos_token_ids:
            found = {"eos_token_id": list(model.eos_token_ids), "pad_token_id": model.pad_token_id}
            write_json(temporary / "generation_config.json", found)
        if model.kind != CAUSAL_LM:
            pooling = pooling_files(model.pooling, model.config.hidden_size)
            for name, value in pooling.items():
                write_json(temporary / name, value)


def class_entries(model: Model) -> tuple[list[Entry], list[Entry]]:
    """`(body, head)` of transformers' class of this model, under the names that it has there.

    An encoder's head on sentence-transformers' pooling has no class: it is left out.
    """
    family, config = model.family, model.config
    entries = family.entries(config)
    if family.kind == CAUSAL_LM:
        head = family.lm_head(config) if model.head is None else family.classifier
        return entries, list(head)
    if model.pooling == FAMILY:
        entries += family.pooler
    if model.pooling != FAMILY or model.head is None:
        return entries, []
    entries = [dataclasses.replace(e, tensor=f"{family.prefix}{e.tensor}") for e in entries]
    return entries, list(family.classifier)


def _class_name(model: Model, has_head: bool) -> str:
    prefix = model.family.class_name(model.config)
    if model.kind == CAUSAL_LM and model.head is None:
        return f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    return f"{prefix}ForSequenceClassification" if has_head else f"{prefix}Model"


def _task_fields(model: Model) -> dict[str, Any]:
    if model.head is None:
        return {}
    if model.labels is not None:
        return dict(model.labels)
    is_number = model.head == "regression" or model.num_labels == 1
    kind = "regression" if is_number else "single_label_classification"
    return label_fields([f"LABEL_{n}" for n in range(model.num_labels or 1)], kind)


def label_fields(names: Sequence[str], kind: str = "single_label_classification") -> dict[str, Any]:
    """What a config.json says of a head with outputs of these names."""
    return {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "problem_type": kind,
    }


def _checked(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
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
    return {
        path: array if isinstance(array, NF4Weight) else np.asarray(array)
        for path, array in given.items()
    }


def _plain_modules(entries: Iterable[Entry], stored: Iterable[NF4Weight]) -> set[str]:
    """The linear modules, by transformers' names, that are not in four bits."""
    quantised = {value.path for value in stored}
    kernels = [entry for entry in entries if entry.path.endswith("/kernel")]
    plain = {e.tensor.removesuffix(".weight") for e in kernels if e.path not in quantised}
    # What is tied, or not there, has no entry, but transformers makes modules of it.
    absent = {"lm_head", "pooler.dense", "classifier", "score"}
    return plain | (absent - {"lm_head"} if "head/kernel" in quantised else absent)
