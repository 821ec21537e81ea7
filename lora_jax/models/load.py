"""`load_model`: from a folder, a file, a hub id or a name to a `Model`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.models.checkpoint import HEAD_FILE, Checkpoint, Request, read_checkpoint
from lora_jax.models.families import CAUSAL_LM, functional_model
from lora_jax.models.functional import flatten, unflatten
from lora_jax.models.gguf.checkpoint import is_gguf, read_gguf_checkpoint
from lora_jax.models.model import NO_HEAD, Model
from lora_jax.models.placing import OnDevice, Quantization
from lora_jax.models.sources import checked_path, find_source
from lora_jax.models.tiny import TINY_MODELS, make_tiny
from lora_jax.quant.quantize import check_format

HEADS = ("classification", "regression")
LARGEST_HEAD = 2**20  # outputs: more than any vocabulary
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_HEAD_PATTERN = r"head/.*"


def load_model(
    path_or_name: str | os.PathLike,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: Any = None,
    head_key: jax.Array | None = None,
    *,
    scan_layers: bool = False,
    untie: bool = False,
    tokenizer: bool = True,
    quantize: str | None = None,
    quantize_targets: str | Sequence[str] = "all-linear",
    double_quant: bool = True,
    sharding_of: Callable[[str, Any], Any] | None = None,
) -> Model:
    """Loads a model from a Hugging Face folder, a `.gguf` file, a name, or a hub id.

    Args:
      path_or_name: the folder, file or hub id, or a name: "minilm", "smollm2-135m" (of packages),
        "tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-llama" (random).
      head: None gives an encoder's hidden states, a decoder's logits. "classification" and
        "regression" put a task's head on it: the folder's own if it has one, else a new one. It is
        float32 or wider whatever `dtype` is: it is trained, and bfloat16 loses small updates.
      num_labels: outputs of a new head (1 for regression).
      dtype: of the weights; None keeps the file's.
      head_key: what a new head is drawn with, `jax.random.key(0)` if None.
      scan_layers: stack a decoder's layers, for models that are deep.
      untie: give a tied embedding's other use, the head, a copy of its own.
      tokenizer: False does without one.
      quantize: "nf4" keeps the kernels that `quantize_targets` names in four bits, quantised one by
        one as they are read (see `lora_jax.quantize`); a folder that bitsandbytes quantised so
        stays as it is.
      quantize_targets, double_quant: as in `lora_jax.quantize`.
      sharding_of: `sharding_of(path, array)` says where each parameter lies on many devices (see
        `lora_jax.parallel.Placement.leaf`), and they go there one by one.

    Returns:
      A `Model`: `apply(params, input_ids, attention_mask)` is a pure function of `params`.

    Raises:
      RequestError: something is missing, damaged or inconsistent.

    >>> model = load_model("tiny-bert", head="classification", num_labels=2)
    >>> encoded = model.tokenizer.encode("a lovely film")
    >>> ids = jnp.array([encoded.ids])
    >>> model.apply(model.params, ids, jnp.ones_like(ids)).shape
    (1, 2)
    """
    if head is not None and head not in HEADS:
        raise RequestError(f"head is {head!r}; choose None, 'classification' or 'regression'")
    num_labels = _checked_num_labels(head, num_labels)
    dtype = None if dtype is None else checked_dtype(dtype)
    name = checked_path(path_or_name)
    quantization = None
    if quantize is not None:
        check_format(quantize)
        quantization = Quantization(quantize_targets, double_quant)
    request = Request(
        has_head=head is not None,
        placing=OnDevice(dtype, name, head is not None, quantization, sharding_of),
        config_changes={"scan_layers": True} if scan_layers else {},
        needs_tokenizer=tokenizer,
    )
    checkpoint = _read(path_or_name, name, request)
    if untie:
        checkpoint = _untied(checkpoint, request)
    return make_model(checkpoint, head, num_labels, head_key)


def _read(path_or_name: str | os.PathLike, name: str, request: Request) -> Checkpoint:
    if name in TINY_MODELS:
        return make_tiny(name, request)
    source = find_source(path_or_name)
    read = read_gguf_checkpoint if is_gguf(source) else read_checkpoint
    return read(source, name, request)


def make_model(
    checkpoint: Checkpoint, head: str | None, num_labels: int | None, head_key: jax.Array | None
) -> Model:
    """The model of a checkpoint, with the head that is asked for."""
    flat = dict(checkpoint.params)
    base = next(iter(flat.values())).dtype
    is_new = head is not None and checkpoint.head is None
    if head is not None:
        num_labels = _num_labels(checkpoint, num_labels)
        shapes, apply = functional_model(checkpoint.config, num_labels, checkpoint.pooling)
        of_head = {path: x.shape for path, x in shapes.items() if path.startswith("head/")}
        new = checkpoint.head or draw_head(of_head, head_key)
        flat |= {path: jnp.array(x, dtype=float32_or_wider(base)) for path, x in new.items()}
    else:
        _, apply = functional_model(checkpoint.config, None, checkpoint.pooling)
    return Model(
        name=checkpoint.name,
        config=checkpoint.config,
        params=unflatten(flat),
        apply=apply,
        aliases=checkpoint.family.aliases(checkpoint.config),
        pooling=checkpoint.pooling,
        stored_tokenizer=checkpoint.tokenizer,
        head=head,
        num_labels=num_labels,
        head_pattern=NO_HEAD if head is None else _HEAD_PATTERN,
        head_is_new=is_new,
        eos_token_ids=checkpoint.eos_token_ids,
        labels=None if is_new else checkpoint.labels,
    )


def redraw_head(model: Model, head_key: jax.Array) -> Model:
    """`model` as `load_model` would have made it with another `head_key`; the base is shared.

    A head that came from a file, and a model without one, stay as they are.
    """
    if not model.head_is_new:
        return model
    flat = flatten(model.params)
    old = {path: x for path, x in flat.items() if path.startswith("head/")}
    new = draw_head({path: x.shape for path, x in old.items()}, head_key)
    flat |= {path: jnp.array(x, dtype=old[path].dtype) for path, x in new.items()}
    redrawn = dataclasses.replace(model, params=unflatten(flat))
    # They do not depend on the head, and take seconds to find: found once for all.
    redrawn.__dict__.update(axes=model.axes, base_hash=model.base_hash)
    return redrawn


def draw_head(shapes: Mapping[str, tuple[int, ...]], key: jax.Array | None) -> dict[str, jax.Array]:
    """A new head: kernels from N(0, 0.02^2), biases zero."""
    key = jax.random.key(0) if key is None else key
    kernels = sorted(path for path in shapes if path.endswith("/kernel"))
    keys = [key] if len(kernels) == 1 else list(jax.random.split(key, len(kernels)))
    drawn = {path: jnp.zeros(shape) for path, shape in shapes.items() if path not in kernels}
    for path, own in zip(kernels, keys, strict=True):
        drawn[path] = 0.02 * jax.random.normal(own, shapes[path])
    return drawn


def _checked_num_labels(head: str | None, num_labels: Any) -> int | None:
    if num_labels is None:
        return 1 if head == "regression" else None
    if head is None:
        raise RequestError(f"num_labels={num_labels!r} needs a head: pass head='classification'")
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
        raise RequestError(f"num_labels is {num_labels!r}; it must be an integer of at least 1")
    if num_labels > LARGEST_HEAD:
        raise RequestError(f"num_labels is {num_labels}; it must be at most {LARGEST_HEAD}")
    if head == "regression" and num_labels != 1:
        raise RequestError(f"num_labels is {num_labels}, but a regression has one output")
    return num_labels


def checked_dtype(dtype: Any) -> np.dtype:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in _DTYPES or not resolved.isnative:
        raise RequestError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}")
    return resolved


def _untied(checkpoint: Checkpoint, request: Request) -> Checkpoint:
    if checkpoint.family.kind != CAUSAL_LM:
        raise RequestError(f"untie is for decoders; model {checkpoint.name} has no head to untie")
    if not checkpoint.config.tie_word_embeddings or request.has_head:
        return checkpoint
    config = dataclasses.replace(checkpoint.config, tie_word_embeddings=False)
    head = jnp.array(checkpoint.params["embed/embedding"].T, copy=True)
    params = {**checkpoint.params, "head/kernel": head}
    return dataclasses.replace(checkpoint, config=config, params=params)


def _num_labels(checkpoint: Checkpoint, num_labels: int | None) -> int:
    if checkpoint.head is None:
        if num_labels is None:
            raise RequestError(
                f"model {checkpoint.name} has no head for a task (neither {HEAD_FILE} nor one of "
                "its own kind); give num_labels for a new head"
            )
        return num_labels
    last = "head/out_proj/kernel" if "head/out_proj/kernel" in checkpoint.head else "head/kernel"
    stored = checkpoint.head[last].shape[-1]
    if not stored:
        raise RequestError(f"the head in {checkpoint.name} has no outputs; its file is damaged")
    if num_labels not in (None, stored):
        raise RequestError(
            f"the head in {checkpoint.name} has {stored} labels, num_labels is {num_labels}; "
            f"leave num_labels out, or remove {HEAD_FILE} for a new head"
        )
    return stored
