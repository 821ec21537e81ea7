"""What a model folder holds, read and checked: config, weights, tokenizer, pooling, head."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.bitsandbytes import is_quantized_config, nf4_tensors
from lora_jax.io.safetensors import read_tensors
from lora_jax.models.config_fields import Fields, read_json
from lora_jax.models.families import CAUSAL_LM, ENCODER, Family, find_family, functional_model
from lora_jax.models.hf_names import Entry, params_from_tensors
from lora_jax.models.placing import Placing
from lora_jax.models.pooling import FAMILY, read_pooling
from lora_jax.models.tokenizer import read_tokenizer
from lora_jax.models.weights_files import open_weights, renamed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A head trained here on another pooling than the family's own is next to the encoder in a file of
# its own, in torch's layout, so that other programs open model.safetensors as the plain encoder.
HEAD_FILE = "head.safetensors"
# What transformers' config.json says of a head, kept with it.
_LABEL_FIELDS = ("id2label", "label2id", "problem_type")
HEAD_ENTRIES = (
    Entry("head.weight", "head/kernel", is_transposed=True),
    Entry("head.bias", "head/bias"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of a folder: with a task's head or without, and where its tensors go.

    `config_changes` are fields of the family's config that are ours to choose (`scan_layers`).
    """

    has_head: bool = False
    placing: Placing = Placing()
    config_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs_tokenizer: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as stored: `params` and `head` are `{path: array}`, kernels (in, out).

    `params` hold everything but a task's head; `head` is None where the folder has none, or none
    was asked for, and `labels` are what its config.json says of the head's outputs.
    """

    name: str
    family: Family
    config: Any
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    pooling: str
    head: dict[str, Any] | None = None
    eos_token_ids: tuple[int, ...] = ()
    labels: Mapping[str, Any] | None = None


def read_checkpoint(folder: str | os.PathLike, name: str, request: Request) -> Checkpoint:
    """Reads a Hugging Face folder; raises `RequestError` for anything missing or inconsistent."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}; check the path")
    if not (folder / "config.json").is_file():
        advice = "a model folder holds config.json, model.safetensors and tokenizer.json"
        raise RequestError(f"{folder} lacks config.json; {advice}")
    place = str(folder / "config.json")
    raw = read_json(place, kind=dict)
    family = find_family(raw.get("model_type"), place)
    config = change_config(family.config.from_json(raw, place), request.config_changes)
    # The tokenizer before the weights: of two errors, the one that is found sooner.
    tokenizer = _read_tokenizer(folder, family, config) if request.needs_tokenizer else None
    tensors, file = open_weights(folder)
    if is_quantized_config(raw, place):
        tensors = nf4_tensors(tensors, str(file))
    pooling = read_pooling(folder) if family.kind == ENCODER else FAMILY
    params, head, pooling = read_params(
        tensors, family, config, request, place=str(file), pooling=pooling
    )
    if request.has_head and (folder / HEAD_FILE).is_file():
        head = _read_head(folder / HEAD_FILE, config.hidden_size, request)
    eos = _eos_token_ids(folder, config) if family.kind == CAUSAL_LM else ()
    labels = {name: raw[name] for name in _LABEL_FIELDS if raw.get(name) is not None}
    return Checkpoint(
        name, family, config, params, tokenizer, pooling, head, eos, labels if head else None
    )


def change_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with the fields that are ours to choose. Raises `RequestError` if it lacks one."""
    for field in changes:
        if not hasattr(config, field):
            raise RequestError(
                f"{field} is not for {type(config).__name__.removesuffix('Config')} models; it is "
                "for GPT-2 and the Llama family"
            )
    return dataclasses.replace(config, **changes)


def read_params(
    tensors: Mapping[str, np.ndarray],
    family: Family,
    config: Any,
    request: Request,
    *,
    place: str,
    pooling: str = FAMILY,
) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """`(params, head, pooling)` of a file's tensors, every one accounted for.

    A head of transformers' own kind is read where one is asked for and there; the pooling becomes
    "cls" for an encoder whose own pooling needs weights that the file lacks.
    """
    names = family.names(tensors)
    tensors = renamed({here: (tensors, there) for here, there in names.items()})
    entries, ignored = list(family.entries(config)), list(family.ignored)
    lm_head = family.lm_head(config)
    if request.has_head or not lm_head:
        # A tied head is often stored, too; a classifier has no use for the other's.
        ignored.append(r"lm_head\.weight")
    elif lm_head[0].tensor not in tensors and entries[0].tensor in tensors:
        raise RequestError(
            f"{place} is a decoder without its head ({lm_head[0].tensor}, which config.json does "
            "not tie); load the folder of its …ForCausalLM model, or head='classification'"
        )
    else:
        entries += lm_head
    _check_names(tensors, entries, place)
    pooler, classifier = list(family.pooler), list(family.classifier)
    if pooling == FAMILY and pooler:
        if all(entry.tensor in tensors for entry in pooler):
            entries += pooler
        else:
            pooling = "cls"
    found = request.has_head and pooling == FAMILY and classifier[-1].tensor in tensors
    if found:
        entries += classifier
    ignored += [re.escape(e.tensor) for e in (*pooler, *classifier) if e not in entries]
    num_labels = tensors[classifier[-1].tensor].shape[:1] if found else ()
    labels = num_labels[0] if num_labels else (1 if request.has_head else None)
    shapes, _ = functional_model(config, labels, pooling)
    if not lm_head and "lm_head.weight" in tensors and not request.has_head:
        _check_tied(tensors, family, config, place)
    placing = request.placing.of(family.aliases(config), [entry.path for entry in entries])
    params = params_from_tensors(
        tensors, entries, shapes, ignored=ignored, place=place, placing=placing
    )
    if not found:
        return params, None, pooling
    head = {entry.path: params.pop(entry.path) for entry in classifier}
    return params, head, pooling


def _check_names(tensors: Mapping[str, Any], entries: Sequence[Entry], place: str) -> None:
    """Raises `RequestError` where most of the file is missing: before a module of as many layers as
    a damaged config claims is traced, which takes minutes for a thousand."""
    missing = [entry.tensor for entry in entries if entry.tensor not in tensors]
    if len(missing) > len(entries) // 2:
        raise RequestError(
            f"{place} does not fit its config.json: missing {', '.join(missing[:6])} and "
            f"{max(0, len(missing) - 6)} more"
        )


def _check_tied(tensors: Mapping[str, np.ndarray], family: Family, config: Any, place: str) -> None:
    table = next(e.tensor for e in family.entries(config) if e.path == "embed/embedding")
    if table in tensors and not np.array_equal(tensors["lm_head.weight"], tensors[table]):
        raise RequestError(
            f"{place} holds an lm_head.weight other than {table}, but its config.json says "
            "tie_word_embeddings=true; set that to false to use both"
        )


def _read_tokenizer(folder: Path, family: Family, config: Any) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise RequestError(
            f"{folder} lacks tokenizer.json; save the model's own there, or pass tokenizer=False "
            "for a model that is given token ids only"
        )
    pad = config.pad_token_id if family.kind == ENCODER else None
    return read_tokenizer(folder / "tokenizer.json", vocab_size=config.vocab_size, pad_token_id=pad)


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Where generation stops: what generation_config.json says, else config.json."""
    file = folder / "generation_config.json"
    found = config.eos_token_id
    if file.is_file():
        raw = read_json(file, kind=dict)
        known = {k: v for k, v in raw.items() if k == "eos_token_id"}
        said = Fields(known, str(file)).special_tokens(config.vocab_size)["eos_token_id"]
        found = found if said is None else said
    return eos_ids(found)


def eos_ids(found: int | Sequence[int] | None) -> tuple[int, ...]:
    """A config's `eos_token_id` as a tuple."""
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _read_head(path: Path, hidden_size: int, request: Request) -> dict[str, Any]:
    tensors = read_tensors(path)
    bias = tensors.get("head.bias")
    labels = len(bias) if bias is not None and np.ndim(bias) == 1 else 1
    shapes = {
        "head/kernel": np.empty((hidden_size, labels)),
        "head/bias": np.empty((labels,)),
    }
    return params_from_tensors(
        tensors, HEAD_ENTRIES, shapes, ignored=(), place=str(path), placing=request.placing
    )
