"""What identifies weights: a hash of their names, dtypes, shapes and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def hash_params(flat: Mapping[str, Any]) -> str:
    """sha256 (hex) of `{path: array}`: path, dtype, shape, bytes (C order), by sorted path."""
    digest = hashlib.sha256()
    for path in sorted(flat):
        array = np.asarray(flat[path], order="C")
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
