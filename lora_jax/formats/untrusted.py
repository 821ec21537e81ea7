"""Reading files that somebody else may have made: regular files only, JSON of any shape."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any


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


def parse_json(text: str | bytes) -> Any:
    """The JSON value that `text` holds.

    Raises:
      ValueError: no JSON, no UTF-8, or nested deeper than Python's parser goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        # Not a ValueError, so that callers which expect a damaged file would let it pass.
        raise ValueError("nested too deep") from error


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in the regular file at `path`. Raises as the two functions above do."""
    return parse_json(read_regular(path).decode("utf-8"))
