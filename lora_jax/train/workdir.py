"""A working folder has one user at a time, and a cell in it belongs to one config."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.io.untrusted import check_fields, read_json
from lora_jax.settings import Settings, config_hash, hashed_settings

# Temporary names of what a cell's folder holds, as io/atomic.py makes them; a user's own files
# (".notes.tmp") are not ours to remove.
_OUR_LEFTOVERS = re.compile(
    r"\.(config\.json|card\.json|failure\.json|metrics\.jsonl|test_predictions\.npz|adapter"
    r"|trainable\.safetensors|adapter\.json|tracking\.json)\.[a-z0-9_]+\.tmp"
)


def config_from(plain: Any, place: Any) -> Settings:
    """The settings that the file at `place` holds, checked. Raises `RequestError`."""
    try:
        settings = Settings.from_config(plain)
        settings.check()
        return settings
    except (TypeError, ValueError) as error:
        raise RequestError(f"{place} holds no config: {error}; restore it") from error


@contextlib.contextmanager
def lock_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds `workdir` for this process, making it if need be; the lock ends with the process.

    A folder that is made here and has nothing in it in the end is taken away again. Raises
    `RequestError` naming the holder's process and host if another one has it, or if the folder
    cannot be made.
    """
    path = Path(workdir) / ".lock"
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except BlockingIOError:
        raise RequestError(
            f"workdir {workdir} is in use by {_holder(path)}; wait for it to end, stop it, or "
            "choose another workdir"
        ) from None
    except OSError as error:
        raise RequestError(f"cannot use workdir {workdir}: {error.strerror or error}") from error
    with file:
        # Informative only: the lock is the kernel's, a stale text here locks nobody out.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield
        finally:
            if made and [*path.parent.iterdir()] == [path]:
                path.unlink()
                path.parent.rmdir()


def is_locked(workdir: str | os.PathLike) -> bool:
    """Whether a process is at work in `workdir`; nothing is changed."""
    path = Path(workdir) / ".lock"
    if not os.path.lexists(path):
        return False
    try:
        file = _open_lock(path, os.O_RDONLY)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _open_lock(path: Path, flags: int):
    """The file at `path`, opened without following a link or waiting for a FIFO's other end.

    A folder may come from somebody else: a `.lock` that is a link would have its target emptied.
    Raises `OSError` that says so.
    """
    elsewhere = OSError(f"{path} is no regular file; remove it")
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise elsewhere from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise elsewhere
    return os.fdopen(handle, "r" if flags == os.O_RDONLY else "a+", encoding="utf-8")


def _holder(path: Path) -> str:
    """What the lock's holder wrote into it; damaged or missing text is no reason to fail."""
    try:
        with _open_lock(path, os.O_RDONLY) as file:
            return "".join(c for c in file.read(200) if c.isprintable()) or "another process"
    except (OSError, ValueError):
        return "another process"


def _lock(path: Path):
    """The open and locked file at `path`. Raises `BlockingIOError` if another process has it."""
    patience = 5
    while True:
        with contextlib.ExitStack() as stack:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            file = stack.enter_context(_open_lock(path, flags))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Whoever asks `is_locked` holds it for a moment.
                patience -= 1
                if not patience:
                    raise
                time.sleep(0.02)
                continue
            # Its last holder may have removed it between our opening and our locking it.
            there = path.lstat() if os.path.lexists(path) else None
            if there is not None and os.path.samestat(os.fstat(file.fileno()), there):
                stack.pop_all()
                return file


def check_cell(cell: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Compares the config that `cell` was begun with, if it was, to `config`.

    Raises `RequestError` listing the keys that differ.
    """
    path = Path(cell) / "config.json"
    if not path.exists():
        return
    there = read_json_file(path)
    check_fields(there, {}, path, "restore it, or remove the cell's folder")
    if config_hash(there) != config_hash(config):
        was, asked = hashed_settings(there), hashed_settings(config)
        values = {
            name: [repr(of.get(name, "(not set)")) for of in (was, asked)]
            for name in sorted(was.keys() | asked.keys())
        }
        differences = [
            f"{name} is {a} there, {b} here" for name, (a, b) in values.items() if a != b
        ]
        raise RequestError(
            f"{cell} was begun with another config: {'; '.join(differences)}; go on with the old "
            "values, choose another workdir or name, or remove that folder"
        )


LONGEST_NAME = 200  # bytes: file systems hold 255, and temporary names add to it


def is_folder_name(name: Any) -> bool:
    """Whether `name` names one folder in another: no path, not hidden, no NUL, not too long."""
    return (
        isinstance(name, str)
        and bool(name)
        and name == Path(name).name
        and not name.startswith(".")
        and "\0" not in name
        and len(name.encode("utf-8", "replace")) <= LONGEST_NAME
    )


# What a run writes, by its place in the folder of a cell or of a pack.
_WRITTEN = ("", "config.json", "card.json", "failure.json", "metrics.jsonl", "checkpoints",
            "adapter", "tensorboard", "test_predictions.npz", "tracking.json",
            "pack.json")  # fmt: skip


def check_inside(folder: Path) -> None:
    """Raises `RequestError` if `folder`, `WORKDIR/KIND/NAME`, or a file in it leads elsewhere.

    A workdir may come from somebody else: what is written or removed in it must lie in it.
    """
    workdir = folder.parent.parent.resolve()
    for path in (folder.parent, *(folder / name if name else folder for name in _WRITTEN)):
        if not path.is_symlink():
            continue
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a link to itself
            real = None
        if real is None or not real.is_relative_to(workdir):
            raise RequestError(
                f"{path} is a link to {os.readlink(path)!r}, outside the workdir; remove the link, "
                "or put what it leads to in its place"
            )
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and not metrics.is_file():
        raise RequestError(f"{metrics} is no regular file; remove it")


def claim_cell(cell: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Begins or goes on with `cell`: writes `config.json` unless a fitting one is there.

    Also removes what a killed process left half written: the caller holds the workdir's lock.
    Raises `RequestError` as `check_cell` does.
    """
    check_inside(Path(cell))
    check_cell(cell, config)
    for leftover in Path(cell).glob(".*.tmp"):
        if not _OUR_LEFTOVERS.fullmatch(leftover.name):
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    path = Path(cell) / "config.json"
    if not path.exists():
        write_json(path, dict(config))


def read_json_file(path: str | os.PathLike) -> Any:
    """The JSON value in `path`. Raises `RequestError` if the file cannot be read or is damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"cannot read {path}: {error}; remove its folder or repair it"
        ) from error
