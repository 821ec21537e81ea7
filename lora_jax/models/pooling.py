"""One vector a text from one vector a token, as the model's card says."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax.core.errors import RequestError
from lora_jax.models.attention import MASKED
from lora_jax.models.config_fields import read_json
from lora_jax.models.sources import is_plain_name


def _cls(h_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return h_BTD[:, 0]


def _mean(h_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    mask = mask_BT.astype(h_BTD.dtype)
    # A row of padding alone pools to zero, not to NaN.
    return jnp.einsum("btd,bt->bd", h_BTD, mask) / jnp.maximum(mask.sum(1), 1e-9)[:, None]


def _max(h_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return jnp.where(mask_BT[..., None] != 0, h_BTD, MASKED).max(1)


# A family's own way from hidden states to its classifier, as transformers has it; it may hold
# parameters, so it is the family's module that knows it.
FAMILY = "family"


def last_token(h_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """(B, D) of the last column that is no padding, wherever the padding is."""
    column_B = mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1] != 0, axis=1)
    return jnp.take_along_axis(h_BTD, column_B[:, None, None], axis=1)[:, 0]


# Each takes float32 or wider (B, T, D) hidden states and the (B, T) mask, and returns (B, D).
POOLINGS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
}

# sentence-transformers' names for the same; the rest of its modes are refused by name.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}


def read_pooling(folder: str | os.PathLike) -> str:
    """Returns the pooling the folder declares in sentence-transformers' way; `FAMILY` if none.

    The place is the `Pooling` entry of `modules.json`, or `1_Pooling/config.json` without one.
    Raises `RequestError` for a mode, or a mixture of modes, that `POOLINGS` does not have.
    """
    folder = Path(folder)
    path = folder / "1_Pooling" / "config.json"
    if (folder / "modules.json").is_file():
        modules = read_json(folder / "modules.json", kind=list)
        entries = [m for m in modules if isinstance(m, dict) and _is_pooling(m)]
        if not entries:
            return FAMILY
        inside = entries[0].get("path", "1_Pooling")
        if not is_plain_name(inside):
            raise RequestError(
                f"{folder}/modules.json names {inside!r}, which is no folder in it; correct it"
            )
        path = folder / inside / "config.json"
        if not path.is_file():
            raise RequestError(f"{folder}/modules.json names {path}, which is missing; restore it")
    elif not path.is_file():
        return FAMILY
    raw = read_json(path, kind=dict)
    chosen = [key for key, value in raw.items() if key.startswith("pooling_mode_") and value]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise RequestError(
            f"{path} asks for pooling {', '.join(sorted(chosen)) or 'of no kind'}; "
            f"exactly one of {', '.join(_MODES)} is supported"
        )
    return _MODES[chosen[0]]


def pooling_files(pooling: str, hidden_size: int) -> dict[str, object]:
    """Returns {relative path: JSON value}, as sentence-transformers and `read_pooling` read it.

    None for a family's own pooling, which sentence-transformers does not know.
    """
    if pooling == FAMILY:
        return {}
    modes = {key: name == pooling for key, name in _MODES.items()}
    return {
        "1_Pooling/config.json": {"word_embedding_dimension": hidden_size, **modes},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {
                "idx": 1,
                "name": "1",
                "path": "1_Pooling",
                "type": "sentence_transformers.models.Pooling",
            },
        ],
    }


def _is_pooling(entry: dict) -> bool:
    return str(entry.get("type", "")).rsplit(".", 1)[-1] == "Pooling"
