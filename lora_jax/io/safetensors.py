"""Tensors in `.safetensors` files: read whole or refused, written whole or not at all.

The format itself is the `safetensors` library's; here are only the errors a user can act on, and
NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`) on both sides.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import atomic_path
from lora_jax.io.lazy import LazyMapping


# What the library and NumPy raise for tensors that a header makes up: dtypes that NumPy lacks, more
# than 64 axes, sizes beyond any memory.
def _damage() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (
        SafetensorError, TypeError, KeyError, AttributeError, ValueError, OverflowError,
        MemoryError,
    )  # fmt: skip


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns every tensor of the file by name, in the dtypes it was stored in.

    Raises `RequestError` naming the file if it is missing, cut short, or no safetensors file.
    """
    with _opened(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except _damage() as error:
            raise _unreadable(path, error) from error


class LazyTensors(LazyMapping):
    """The tensors of one `.safetensors` file by name, each read when it is asked for.

    Raises `RequestError` as `read_tensors` does: for the file here, for a tensor when it is read.
    """

    def __init__(self, path: str | os.PathLike):
        file = _opened(path)

        def read(name: str) -> np.ndarray:
            try:
                return file.get_tensor(name)
            except _damage() as error:
                raise _unreadable(path, error) from error

        super().__init__(file.keys(), read)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Returns the file's text metadata ({} if it has none); raises as `read_tensors` does."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays (NumPy or JAX, any layout) to `path` atomically.

    `metadata` defaults to `{"format": "pt"}`, without which transformers refuses a file.
    """
    # The library writes an array's buffer as it lies in memory, ignoring strides: a transposed view
    # would be stored scrambled unless it is laid out in C order first.
    from safetensors.numpy import save

    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    content = _in_order(save(arrays, metadata=dict(metadata or {"format": "pt"})))
    # Written by Python rather than by the library, so that a full disk is an OSError.
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _in_order(content: bytes) -> bytes:
    """The file with its metadata sorted: the library's order differs from run to run."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the library writes it
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _opened(path: str | os.PathLike):
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} does not exist or is not a file; check the path")
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise RequestError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: "
            f"{error}; download or copy it again"
        ) from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error


def _unreadable(path: str | os.PathLike, error: Exception) -> RequestError:
    # NumPy has no type for some of the format's dtypes (the 8- and 4-bit floats, say).
    return RequestError(
        f"{path} holds a tensor NumPy cannot represent ({error}); "
        "convert the file to float32, float16 or bfloat16"
    )
