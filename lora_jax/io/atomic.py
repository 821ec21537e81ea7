"""Files that appear whole or not at all: written next to their place, then renamed into it."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; renames it to `path` on success.

    On any error the temporary file is removed and `path` is as it was. A full or read-only disk is
    a `RequestError` that names the path.
    """
    path = at_home(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _write_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _put(temporary, path, 0o666)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder next to `path`; renames it to `path` on success.

    Raises `RequestError` if `path` exists already or the disk cannot take it.
    """
    path = at_home(path)
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        handle = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        # Held until the end: `_remove_leftovers` of another process leaves a locked folder alone.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield temporary
        _put(temporary, path, 0o777)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, path: Path, mode: int) -> None:
    """Renames, with the permissions that a plain `open` or `mkdir` would have given."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, mode & ~umask)
    os.replace(temporary, path)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary folders that killed writers of `path` left next to it.

    A folder of this name that is locked, or younger than a minute, may be another process's.
    """
    ours = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.tmp")
    for leftover in path.parent.iterdir():
        if not ours.fullmatch(leftover.name) or leftover.is_symlink() or not leftover.is_dir():
            continue
        if time.time() - leftover.stat().st_mtime < 60:
            continue
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(handle)


def check_new(path: str | os.PathLike) -> None:
    """Raises `RequestError` if there is something at `path` already: before the long work."""
    if os.path.lexists(at_home(path)):
        raise RequestError(f"{path} exists already; choose another folder or remove it first")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=True) + "\n")


def _write_error(path: Path, error: OSError) -> RequestError:
    reason = error.strerror or str(error)
    return RequestError(f"cannot write {path}: {reason}; free some space or choose another folder")
