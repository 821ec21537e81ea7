"""Paths as users give them: `~` is the home folder."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from lora_jax.core.errors import RequestError


def at_home(path: str | os.PathLike) -> Path:
    r"""The path with `~` as the home folder.

    Raises `RequestError` for a Windows path on another system, where it would make one folder with
    backslashes in its name.

    >>> at_home("runs/first").as_posix()
    'runs/first'
    """
    text = os.fspath(path)
    if os.name != "nt" and re.match(r"[A-Za-z]:\\", text):
        raise RequestError(f"{text!r} is a Windows path, and this is {sys.platform}; use slashes")
    # Another user's home ("~name") may be a file of that name as well: only the own one is meant.
    return Path(os.path.expanduser(text) if text == "~" or text.startswith("~/") else text)
