"""Reading files that somebody else may have made: regular files only, JSON of any shape.

`check_fields` is for what code is about to rely on: a file that lacks it is named in one line.
"""

from __future__ import annotations

import io
import json
import os
import re
import reprlib
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError

DEEPEST = 100  # levels of JSON: what walks through it by recursion has some frames beneath already
LARGEST_ARRAYS = 2**31  # bytes that a .npz may unpack to


def read_regular(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file.

    Opened without waiting: a FIFO of that name would hang the reader, a device never ends.

    Raises:
      OSError: the file is missing, unreadable, or no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{Path(path).name} is no regular file")
        return file.read()


def parse_json(text: str | bytes, *, halves: bool = False) -> Any:
    """The JSON value that `text` holds.

    Args:
      text: one JSON value.
      halves: texts with half a surrogate pair pass; the caller looks for them itself.

    Raises:
      ValueError: no JSON, no UTF-8, nested deeper than DEEPEST, or with half a surrogate pair,
        which can be neither printed nor written.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        # Not a ValueError, so that callers which expect a damaged file would let it pass.
        raise ValueError("nested too deep") from error
    level, depth = [value], 0
    while level := [x for one in level if isinstance(one, dict | list) for x in _inside(one)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deep")
    # A half can come from an escape alone: UTF-8 has none.
    has_escapes = b"\\u" in text if isinstance(text, bytes) else "\\u" in text
    if not halves and has_escapes:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def printable(text: str) -> str:
    """Text without the control characters (escape codes) that a stranger's file may hold; tabs and
    ends of lines stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def escaped(text: str) -> str:
    """Text with what cannot be printed written out, such as \\x1b; ends of lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _inside(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in the regular file at `path`. Raises as the two functions above do."""
    return parse_json(read_regular(path).decode("utf-8"))


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of the `.npz` at `path`, none of them pickled.

    Raises:
      OSError, ValueError: no regular file, no such archive, or one that unpacks to more than
        LARGEST_ARRAYS.
    """
    data = read_regular(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (size := sum(one.file_size for one in archive.infolist())) > LARGEST_ARRAYS:
                raise ValueError(f"unpacks to {size} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # zipfile, zlib, tokenize and NumPy raise a dozen types for damaged bytes.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


COUNT = "a count"
NUMBER = "a number"
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number of 64 bits"}


def check_fields(value: Any, fields: Mapping[str, Any], place: Any, way_out: str) -> None:
    """Checks the fields of a JSON object that the caller relies on.

    Args:
      value: what was read.
      fields: by dotted name ("metrics.test.loss") the kind: dict, list, str, int, COUNT (from 0
        to 2**63), NUMBER (a float can hold it). "?metrics.x" may be missing.
      place: the file.
      way_out: what to do about it, for the end of the message.

    Raises:
      RequestError: a field is missing or of another kind.
    """
    if not isinstance(value, dict):
        raise RequestError(f"{place} holds no JSON object; {way_out}")
    for name, kind in fields.items():
        found: Any = value
        is_there, optional = True, name.startswith("?")
        for key in name.removeprefix("?").split("."):
            known = found if isinstance(found, dict) else {}
            is_there, found = key in known, known.get(key)
        if optional and not is_there:
            continue
        if not is_there:
            raise RequestError(f"{place}: {name.removeprefix('?')} is missing; {way_out}")
        check_kind(found, kind, name.removeprefix("?"), place, way_out)


def check_kind(value: Any, kind: Any, name: str, place: Any, way_out: str) -> None:
    """Checks one value as `check_fields` does. Raises `RequestError`."""
    if not _is_of_kind(value, kind):
        wanted = kind if isinstance(kind, str) else _KINDS[kind]
        shown = reprlib.repr(value)
        raise RequestError(f"{place}: {name} is {shown}, but must be {wanted}; {way_out}")


def _is_of_kind(value: Any, kind: Any) -> bool:
    if kind is NUMBER:
        return value is not None and is_number_or_null(value)
    if kind is COUNT:
        return type(value) is int and 0 <= value < 2**63
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    return isinstance(value, kind)


def is_number_or_null(value: Any) -> bool:
    """Whether it is null, or a number that a float can hold (NaN and infinities included)."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63
