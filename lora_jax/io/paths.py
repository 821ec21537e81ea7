"""Paths as users give them: `~` is the home folder, a workdir with one run is that run."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError


def cell_of(path: str | os.PathLike, *, having: str = "config.json") -> Path:
    """The folder of a cell with that file: itself, or the only one of a workdir."""
    folder = at_home(path)
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}; give a run's WORKDIR/cells/NAME")
    if (folder / having).exists():
        return folder
    cells = sorted(p.parent for p in folder.glob("cells/*/config.json"))
    if len(cells) == 1:
        return cells[0]
    if cells:
        raise RequestError(f"{folder} holds {len(cells)} cells; name one, such as {cells[0]}")
    raise RequestError(f"{folder} holds no run; give a run's WORKDIR/cells/NAME")


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


def read_path(text: Any) -> Any:
    """An option's path as text, with `~` as the home folder; raises as `at_home`."""
    if not isinstance(text, str):
        return text
    path = at_home(text)
    return text if path == Path(text) else str(path)
