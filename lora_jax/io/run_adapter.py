"""What a run trained, as a folder: `trainable.safetensors` and, in `method.json`, what it fits.

Tensors are named "<adapter>:<part>": "<path>:a", "<path>:b" (LoRA's factors; other methods have
other parts), "<path>:value" (a parameter trained whole), in this project's orientation and dtypes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import atomic_folder, write_json
from lora_jax.io.paths import at_home
from lora_jax.io.safetensors import read_tensors, write_tensors
from lora_jax.io.untrusted import read_json

TENSORS, DESCRIPTION = "trainable.safetensors", "method.json"


def save_trainable(
    folder: str | os.PathLike, trainable: Mapping[str, Mapping[str, Any]], description: Any
) -> None:
    """Writes `{path: {part: array}}` and the JSON `description` as a new folder, atomically.

    Raises `RequestError` if the folder exists or the disk cannot take it.
    """
    tensors = {
        f"{path}:{part}": np.asarray(array)
        for path, entry in trainable.items()
        for part, array in entry.items()
    }
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / TENSORS, tensors, metadata={"format": "lora_jax"})
        write_json(temporary / DESCRIPTION, description)


def load_trainable(folder: str | os.PathLike) -> tuple[dict[str, dict[str, Any]], Any]:
    """`(trainable, description)` of a folder that `save_trainable` wrote, bit for bit.

    Raises `RequestError` if a file is missing, damaged, or holds tensors of another naming.
    """
    folder = at_home(folder)
    try:
        description = read_json(folder / DESCRIPTION)
    except FileNotFoundError as error:
        raise RequestError(
            f"{folder} holds no {DESCRIPTION}; give the adapter/ folder of a finished run"
        ) from error
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {folder / DESCRIPTION}: {error}") from error
    trainable: dict[str, dict[str, Any]] = {}
    for name, array in read_tensors(folder / TENSORS).items():
        path, _, part = name.rpartition(":")
        if not path or not part.isidentifier():
            raise RequestError(
                f"{folder / TENSORS} holds a tensor {name!r}, which is not named "
                '"<path>:<part>", as "<path>:a"; it is not an adapter of this project'
            )
        trainable.setdefault(path, {})[part] = jnp.array(array, copy=True)
    return trainable, description
