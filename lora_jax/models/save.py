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
    """Writes `params` (a whole tree, as `method.merge` gives it) as a new model folder.

    Weights go to model.safetensors under transformers' names, each in its own dtype: a decoder with
    its head, an encoder with a head of its family's own kind as the class for sequence
    classification. A head on another pooling goes to head.safetensors (`head.weight` (num_labels,
    D), `head.bias`) beside the plain encoder. Kernels in four bits are written as bitsandbytes has
    them, for transformers to open in four bits. With them config.json, tokenizer.json and the
    pooling. The folder appears whole, by a rename, or not at all. Raises `RequestError` if it
    exists or `params` are not the model's.
    """
    flat = _checked(model, params)
    entries, head_entries, class_name = _entries(model)
    config = model.config.to_json() | {"architectures": [class_name]} | _task_fields(model)
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
        if head_entries:
            write_tensors(temporary / HEAD_FILE, tensors_from_params(flat, head_entries))
        if model.kind == CAUSAL_LM and model.eos_token_ids:
            found = {"eos_token_id": list(model.eos_token_ids), "pad_token_id": model.pad_token_id}
            write_json(temporary / "generation_config.json", found)
        if model.kind != CAUSAL_LM:
            pooling = pooling_files(model.pooling, model.config.hidden_size)
            for name, value in pooling.items():
                write_json(temporary / name, value)


def _entries(model: Model) -> tuple[list[Entry], list[Entry], str]:
    """`(of model.safetensors, of head.safetensors, transformers' class)`."""
    family, config = model.family, model.config
    entries, prefix = family.entries(config), family.class_name(config)
    has_head = model.head is not None
    if family.kind == CAUSAL_LM:
        heads = list(family.classifier) if has_head else family.lm_head(config)
        task = "ForSequenceClassification" if has_head else _lm_class(prefix)
        return [*entries, *heads], [], prefix + task
    if model.pooling != FAMILY:
        return list(entries), list(HEAD_ENTRIES) if has_head else [], f"{prefix}Model"
    entries = [*entries, *family.pooler]
    if not has_head:
        return entries, [], f"{prefix}Model"
    entries = [dataclasses.replace(e, tensor=f"{family.prefix}{e.tensor}") for e in entries]
    return [*entries, *family.classifier], [], f"{prefix}ForSequenceClassification"


def _lm_class(prefix: str) -> str:
    return "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"


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
