"""`load_model`: from a folder, a hub id or a name to a `Model`."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.core.errors import RequestError
from lora_jax.models.checkpoint import HEAD_FILE, Checkpoint, read_checkpoint
from lora_jax.models.functional import flatten, functional, unflatten
from lora_jax.models.model import Model
from lora_jax.models.sources import TINY_BERT, find_folder
from lora_jax.models.tiny import make_tiny_bert

_HEADS = (None, "classification")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_model(
    path_or_name: str | os.PathLike,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: Any = None,
    head_key: jax.Array | None = None,
) -> Model:
    """Loads a model from a folder, a name ("minilm", "tiny-bert") or a Hugging Face hub id.

    `head="classification"` adds a linear head on the pooled output: the folder's own
    (`head.safetensors`) if it has one, else a new one of `num_labels` outputs drawn with `head_key`
    (`jax.random.key(0)` if None). `dtype` converts the weights; None keeps the file's. The head is
    float32 or wider whatever the dtype: it is trained, and bfloat16 loses small updates. Raises
    `RequestError` for whatever is missing, damaged or inconsistent.

    >>> model = load_model("tiny-bert", head="classification", num_labels=2)
    >>> encoded = model.tokenizer.encode("a lovely film")
    >>> ids = jnp.array([encoded.ids])
    >>> model.apply(model.params, ids, jnp.ones_like(ids)).shape
    (1, 2)
    """
    if head not in _HEADS:
        raise RequestError(f"head is {head!r}; choose None or 'classification'")
    _check_num_labels(head, num_labels)
    dtype = None if dtype is None else _checked_dtype(dtype)
    if path_or_name == TINY_BERT:
        checkpoint = make_tiny_bert()
    else:
        checkpoint = read_checkpoint(find_folder(path_or_name), os.fspath(path_or_name))
    flat = {path: _converted(x, dtype, checkpoint.name) for path, x in checkpoint.params.items()}
    if head is not None:
        stored = _stored_head(checkpoint, num_labels)
        base = next(iter(flat.values())).dtype
        new = stored or _new_head(checkpoint.config.hidden_size, num_labels, head_key)
        flat |= {path: _wide(x, base) for path, x in new.items()}
        num_labels = flat["head/bias"].shape[0]
    family, config, pooling = checkpoint.family, checkpoint.config, checkpoint.pooling
    _, apply = functional(
        lambda: family.module(config, num_labels=num_labels, pooling=pooling, rngs=nnx.Rngs(0))
    )
    return Model(
        name=checkpoint.name,
        config=config,
        params=unflatten(flat),
        apply=apply,
        tokenizer=checkpoint.tokenizer,
        aliases=family.aliases,
        pooling=pooling,
        head=head,
        num_labels=num_labels,
        head_is_new=head is not None and stored is None,
    )


def redraw_head(model: Model, head_key: jax.Array) -> Model:
    """`model` as `load_model` would have made it with another `head_key`; the base is shared.

    A head that came from a file, and a model without one, stay as they are.
    """
    if not model.head_is_new:
        return model
    flat = flatten(model.params)
    kernel = flat["head/kernel"]
    new = _new_head(*kernel.shape, head_key)
    flat |= {path: jnp.array(x, dtype=kernel.dtype) for path, x in new.items()}
    redrawn = dataclasses.replace(model, params=unflatten(flat))
    # They do not depend on the head, and take seconds to find: found once for all.
    redrawn.__dict__.update(axes=model.axes, base_hash=model.base_hash)
    return redrawn


def _check_num_labels(head: str | None, num_labels: Any) -> None:
    if num_labels is None:
        return
    if head is None:
        raise RequestError(f"num_labels={num_labels!r} needs a head: pass head='classification'")
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
        raise RequestError(f"num_labels is {num_labels!r}; it must be an integer of at least 1")


def _checked_dtype(dtype: Any) -> np.dtype:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in _DTYPES:
        raise RequestError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}")
    return resolved


def _converted(array: np.ndarray, dtype: np.dtype | None, name: str) -> jax.Array:
    dtype = dtype or array.dtype
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise RequestError(
            f"model {name} in float64 needs jax.config.update('jax_enable_x64', True); "
            "or pass dtype='float32'"
        )
    # A copy of its own: JAX may otherwise keep a view of the file's memory.
    return jnp.array(array, dtype=dtype)


def _wide(array: Any, base: np.dtype) -> jax.Array:
    return jnp.array(array, dtype=jnp.promote_types(base, jnp.float32))


def _stored_head(checkpoint: Checkpoint, num_labels: int | None) -> dict[str, np.ndarray] | None:
    if checkpoint.head is None:
        if num_labels is None:
            raise RequestError(
                f"model {checkpoint.name} has no {HEAD_FILE}; give num_labels for a new head"
            )
        return None
    stored = checkpoint.head["head/bias"].shape[0]
    if num_labels not in (None, stored):
        raise RequestError(
            f"the head in {checkpoint.name} has {stored} labels, num_labels is {num_labels}; "
            f"leave num_labels out, or remove {HEAD_FILE} for a new head"
        )
    return checkpoint.head


def _new_head(hidden_size: int, num_labels: int, key: jax.Array | None) -> dict[str, jax.Array]:
    key = jax.random.key(0) if key is None else key
    kernel = 0.02 * jax.random.normal(key, (hidden_size, num_labels))
    return {"head/kernel": kernel, "head/bias": jnp.zeros((num_labels,))}
