"""The header of a `.gguf` file: its metadata, and where and how each tensor lies in it.

Read here rather than by the `gguf` library's reader, which believes the counts a file claims (past
the end of a file that was cut short it loops until memory is full), and which takes seconds for a
vocabulary that is read here in a fraction of one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.gguf.types import block_of, expandable_types

_VERSIONS = (2, 3)
# No model comes near these: the largest vocabularies make headers of some 20 MB.
_MAX_HEADER_BYTES = 1 << 26
_MAX_ITEMS = 1 << 21
_MAX_NAME_BYTES = 1 << 10
_MAX_AXES = 4

# The format's value types: one struct code each, except the two that have a length of their own.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i",
    6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_UINT32, _STRING, _ARRAY = 4, 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where and how a tensor lies in its file; `shape` is row-major, as NumPy and torch say it."""

    shape: tuple[int, ...]
    type: str
    start: int
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Returns the metadata and the tensors' places of a little-endian GGUF file, version 2 or 3.

    Raises `RequestError` naming the file if it is missing, of another format, version or byte
    order, cut short (the tensors' own bytes included), or claims what no model has.
    """
    if not path.is_file():
        raise RequestError(f"{path} does not exist or is not a file; check the path")
    try:
        with path.open("rb") as file:
            header = _Header(file, path)
            num_tensors, num_entries = header.counts()
            metadata = header.metadata(num_entries)
            return metadata, header.infos(num_tensors, metadata)
    except OSError as error:
        raise unreadable(path, error) from error


class _Header:
    """Reads a header from its start; nothing is read that is longer than what is left."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file = file
        self._path = path
        self._size = path.stat().st_size
        self._position = 0

    def counts(self) -> tuple[int, int]:
        if self._size < 4 or self._take(4, "the format's name") != b"GGUF":
            raise RequestError(
                f"{self._path} ({self._size} bytes) is not a GGUF file; check the path, or "
                "download it again"
            )
        raw = self._take(4, "the version")
        version = int.from_bytes(raw, "little")
        if version not in _VERSIONS:
            if int.from_bytes(raw, "big") in _VERSIONS:
                raise RequestError(
                    f"{self._path} is a big-endian GGUF file, and only little-endian ones are "
                    "read; convert it with gguf-convert-endian"
                )
            raise RequestError(
                f"{self._path} is GGUF version {version}, and versions 2 and 3 are read; convert "
                "the model again with a current llama.cpp"
            )
        num_tensors, num_entries = (self._number("Q", "the counts") for _ in range(2))
        # Name length, type and offset of a tensor; name length, type and value of an entry.
        self._check_count(num_tensors, 24, "tensors")
        self._check_count(num_entries, 13, "metadata entries")
        return num_tensors, num_entries

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._name("a metadata key", metadata)
            kind = self._number("I", key)
            metadata[key] = self._value(kind, key)
            # Read when the data are found, where a wrong one would shift every tensor.
            if key == "general.alignment" and kind != _UINT32:
                raise damaged(self._path, f"{key} is of type {kind} instead of {_UINT32}")
        return metadata

    def infos(self, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise damaged(self._path, f"general.alignment is {alignment}, no power of two")
        infos: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = self._name("a tensor's name", infos)
            what = f"tensor {name!r}"
            num_axes = self._number("I", what)
            if num_axes > _MAX_AXES:
                raise damaged(self._path, f"{what} claims {num_axes} axes")
            # The file lists the fastest axis first.
            shape = tuple(self._number("Q", what) for _ in range(num_axes))[::-1]
            kind, offset = self._number("I", what), self._number("Q", what)
            name_of_type, num_bytes = self._layout(shape, kind, what)
            infos[name] = TensorInfo(shape, name_of_type, offset, num_bytes)
        data_start = -(-self._position // alignment) * alignment
        for name, info in infos.items():
            end = data_start + info.start + info.num_bytes
            if end > self._size:
                raise damaged(
                    self._path,
                    f"tensor {name!r} ends at byte {end}, and the file has {self._size}",
                )
            infos[name] = dataclasses.replace(info, start=data_start + info.start)
        return infos

    def _layout(self, shape: tuple[int, ...], kind: int, what: str) -> tuple[str, int]:
        layout = block_of(kind)
        if layout is None:
            raise RequestError(
                f"{self._path}: {what} is of type {kind}, which the gguf library does not know; "
                f"update gguf, or convert the file to one of {', '.join(expandable_types())}"
            )
        name, block, block_bytes = layout
        if 0 in shape or (shape[-1] if shape else 1) % block:
            raise damaged(self._path, f"{what} claims shape {shape} in blocks of {block} ({name})")
        return name, math.prod(shape) // block * block_bytes

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind == _STRING:
            return self._text(self._number("Q", key), key)
        if kind != _ARRAY:
            raise damaged(self._path, f"{key} is of type {kind}, which the format does not have")
        item, count = self._number("I", key), self._number("Q", key)
        if item == _STRING:
            self._check_count(count, 8, f"strings in {key}")
            return [self._text(self._number("Q", key), key) for _ in range(count)]
        if item not in _SCALARS:
            raise damaged(self._path, f"{key} is an array of type {item}, which is not read")
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        self._check_count(count, dtype.itemsize, f"values in {key}")
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype).tolist()

    def _name(self, what: str, taken: Mapping[str, Any]) -> str:
        length = self._number("Q", what)
        if length > _MAX_NAME_BYTES:
            raise damaged(self._path, f"{what} claims {length} bytes")
        name = self._text(length, what)
        if name in taken:
            raise damaged(self._path, f"{what} is there twice, {name!r}")
        # Names go into messages, which are one line.
        if not name or not name.isprintable():
            raise damaged(self._path, f"{what} is {name!r}")
        return name

    def _text(self, length: int, what: str) -> str:
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise damaged(self._path, f"{what} is not UTF-8 ({error.reason})") from error

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), what))[0]

    def _check_count(self, count: int, item_bytes: int, what: str) -> None:
        if count > _MAX_ITEMS or count * item_bytes > self._size - self._position:
            raise damaged(
                self._path,
                f"it claims {count} {what} (at most {_MAX_ITEMS} are read), with "
                f"{self._size - self._position} bytes to come",
            )

    def _take(self, count: int, what: str) -> bytes:
        self._position += count
        if self._position > self._size:
            raise damaged(
                self._path,
                f"{what} ends at byte {self._position}, and the file has {self._size}",
            )
        if self._position > _MAX_HEADER_BYTES:
            raise damaged(self._path, f"it claims more than {_MAX_HEADER_BYTES} bytes of metadata")
        content = self._file.read(count)
        if len(content) < count:
            raise damaged(self._path, f"{what} was cut off while it was read")
        return content


def damaged(path: Path, what: str) -> RequestError:
    """Returns the error for a file whose content cannot be what was written."""
    return RequestError(f"{path} is truncated or damaged: {what}; download or copy it again")


def unreadable(path: Path, error: OSError) -> RequestError:
    """Returns the error for a file that the system does not give."""
    return RequestError(f"cannot read {path}: {error.strerror or error}")
