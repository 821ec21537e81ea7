"""Reading `.gguf` files, llama.cpp's format: metadata, and tensors expanded to float32.

What the bits of a quantised tensor mean is the `gguf` library's (`types.py`); the header is
read here (`header.py`).
"""

import dataclasses
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.gguf.header import TensorInfo, damaged, read_header, unreadable
from lora_jax.io.gguf.types import expandable_types, expanded
from lora_jax.io.lazy import LazyMapping

# How much of a tensor is expanded at a time, in float32 bytes: the library's own working copies
# are as large as what it is given.
_CHUNK_BYTES = 1 << 23

_REQUIRED = object()


class GgufTensors(LazyMapping):
    """`{name: float32 array, (out, in) for a matrix}`; each access reads and expands one tensor.

    An access raises `RequestError` if the tensor's number format cannot be expanded, or the file
    has changed.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]):
        super().__init__(infos, self._expanded)
        self._path = path
        self._infos = dict(infos)

    def _expanded(self, name: str) -> np.ndarray:
        info = self._infos[name]
        if info.type not in expandable_types():
            raise RequestError(
                f"{self._path}: tensor {name!r} is of type {info.type}, which the gguf library "
                f"cannot expand; convert the file to one of {', '.join(expandable_types())}"
            )
        columns = info.shape[-1] if info.shape else 1
        rows = math.prod(info.shape) // columns
        values = np.empty((rows, columns), np.float32)
        step = max(1, _CHUNK_BYTES // (4 * columns))
        row_bytes = info.num_bytes // rows
        try:
            with self._path.open("rb") as file:
                file.seek(info.start)
                for first in range(0, rows, step):
                    part = values[first : first + step]
                    content = file.read(len(part) * row_bytes)
                    if len(content) < len(part) * row_bytes:
                        raise damaged(self._path, f"tensor {name!r} was cut off since opening")
                    raw = np.frombuffer(content, np.uint8).reshape(len(part), row_bytes)
                    part[:] = expanded(raw, info.type)
        except OSError as error:
            raise unreadable(self._path, error) from error
        return values.reshape(info.shape)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns the shape that `self[name]` will have, without reading it."""
        return self._infos[name].shape

    def type_of(self, name: str) -> str:
        """Returns the number format the tensor is stored in ("F32", "Q4_1", …)."""
        return self._infos[name].type


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file: `metadata` as plain Python values (lists for arrays), `tensors` lazily.

    The methods return a metadata value of one kind, or `default` if the file has none; without a
    default, and for a value of another kind, they raise `RequestError`.
    """

    path: Path
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)
    tensors: GgufTensors = dataclasses.field(repr=False)

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, default, lambda x: isinstance(x, str), "a string")

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 0) -> Any:
        wanted = f"an integer of at least {minimum}"
        return self._value(key, default, lambda x: _is_integer(x) and x >= minimum, wanted)

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default, _is_positive, "a positive number")
        return value if value is default else float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, default, lambda x: isinstance(x, bool), "true or false")

    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, default, lambda x: _is_list(x, str), "a list of strings")

    def integers(self, key: str, default: Any = _REQUIRED) -> Any:
        wanted = "a list of integers"
        return self._value(key, default, lambda x: _is_list(x, int), wanted)

    def error(self, key: str, wanted: str) -> RequestError:
        """Returns the error that says what the metadata `key` is and what it must be."""
        return self.refusal(key, f"but must be {wanted}; convert the model again")

    def refusal(self, key: str, reason: str) -> RequestError:
        """Returns the error that says what the metadata `key` is, and then `reason`."""
        value = reprlib.repr(self.metadata.get(key))
        return RequestError(f"{self.path}: {key} is {value}, {reason}")

    def _value(self, key: str, default: Any, is_right: Any, wanted: str) -> Any:
        if key not in self.metadata:
            if default is _REQUIRED:
                raise RequestError(
                    f"{self.path} lacks the metadata {key}; convert the model again with "
                    "llama.cpp's convert_hf_to_gguf.py"
                )
            return default
        if not is_right(self.metadata[key]):
            raise self.error(key, wanted)
        return self.metadata[key]


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """Reads the header of a GGUF file (versions 2 and 3, little-endian); no tensor is read yet.

    Raises `RequestError` naming the file if it is missing, of another format, version or byte
    order, cut short (the tensors' own bytes included), or claims what no model has.
    """
    path = Path(path)
    metadata, infos = read_header(path)
    return GgufFile(path, MappingProxyType(metadata), GgufTensors(path, infos))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and 0.0 < value < math.inf


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
