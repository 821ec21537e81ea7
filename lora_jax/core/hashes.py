"""What identifies weights: a hash of their names, dtypes, shapes and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.trees import Stored


def hash_params(flat: Mapping[str, Any]) -> str:
    """sha256 (hex) of `{path: array}`: path, dtype, shape, bytes (C order), by sorted path.

    Of what is stored in another form, its arrays as `path/NAME`, and the dtype it stands for.
    """
    digest = hashlib.sha256()
    plain: dict[str, Any] = {}
    for path, leaf in flat.items():
        if isinstance(leaf, Stored):
            plain |= {f"{path}/{name} of {leaf.dtype}": x for name, x in leaf.arrays().items()}
        else:
            plain[path] = leaf
    for path in sorted(plain):
        array = np.asarray(plain[path], order="C")
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
