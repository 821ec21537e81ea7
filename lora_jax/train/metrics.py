"""Metrics on disk: one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_text
from lora_jax.io.untrusted import parse_json, read_regular


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a torn last line is left out.

    Raises `RequestError` if a line before the last one is damaged.
    """
    lines = _lines_of(Path(path))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line) if line else None
        except ValueError as error:
            # A process killed while it wrote leaves a beginning of a line and no line end.
            if number == len(lines):
                break
            raise RequestError(f"{path}:{number} is damaged ({error}); remove that line") from error
        if row is not None and number < len(lines):
            rows.append(row)
    return rows


def _lines_of(path: Path) -> list[bytes]:
    """What stands between line ends; the last one is not ended."""
    if not path.exists():
        return []
    try:
        return read_regular(path).split(b"\n")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error


def readable_metrics(path: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """The metrics up to `step` that can be read; damaged lines are left out."""
    rows = []
    for line in _lines_of(path)[:-1]:
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                rows.append(row)
    return rows


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends metrics to `folder/metrics.jsonl`; a context manager.

    Opening cuts what is there back to `num_lines` lines, those that the checkpoint of `step` knew,
    so that a resumed run's file is an uninterrupted run's. Lines that are missing or damaged are
    left out, with a note on stderr. Raises `RequestError` if the disk cannot take a line.
    `num_lines` counts the lines in the file.
    """

    def __init__(self, folder: str | os.PathLike, *, num_lines: int, step: int):
        self._path = Path(folder) / "metrics.jsonl"
        rows = readable_metrics(self._path, step)[:num_lines]
        if len(rows) < num_lines:
            # A log is no reason to lose a training: weights and progress are in the checkpoint.
            print(
                f"{self._path}: {num_lines - len(rows)} of {num_lines} lines are missing or "
                f"damaged; the training goes on from step {step} without them",
                file=sys.stderr,
            )
        self.num_lines = len(rows)
        if self._path.exists():
            write_text(self._path, "".join(map(_line, rows)))
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, *, step: int, split: str, **values: float | None) -> None:
        """One line: `step`, `split` and the values that apply (loss, accuracy, lr, seconds, …)."""
        with self._writing():
            self._file.write(_line({"step": step, "split": split, **values}))
            self._file.flush()
            self.num_lines += 1

    def sync(self) -> None:
        """Forces the lines onto the disk; done before a checkpoint that counts on them."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(self, kind, error, trace) -> None:
        try:
            with self._writing():
                self._file.close()
        except RequestError:
            if error is None:  # else what went wrong first is the better story
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"cannot write metrics to {self._path}: {error.strerror or error}; free some space "
                "and run the same command again: it goes on from the last checkpoint"
            ) from error


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
