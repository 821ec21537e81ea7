"""Metrics on disk: one JSON object a line, and the same in TensorBoard's event files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_text
from lora_jax.io.untrusted import parse_json, read_regular
from lora_jax.train.events import EventFile


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a torn last line is left out.

    Raises `RequestError` if a line before the last one is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = _bytes_of(path).split(b"\n")
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


def _bytes_of(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error


def _readable(path: Path, step: int) -> list[dict[str, Any]]:
    """The metrics up to `step` that can be read."""
    rows = []
    for line in _bytes_of(path).split(b"\n")[:-1] if path.exists() else []:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            rows.append(row)
    return rows


class MetricsWriter:
    """Appends metrics to `folder/metrics.jsonl` and `folder/tensorboard/`; a context manager.

    Opening cuts what is there back to `num_lines` lines, those that the checkpoint of `step` knew,
    so that a resumed run's file is an uninterrupted run's. Lines that are missing or damaged are
    left out, with a note on stderr. Raises `RequestError` if the disk cannot take a line.
    `num_lines` counts the lines in the file.
    """

    def __init__(self, folder: str | os.PathLike, *, num_lines: int, step: int):
        self._path = Path(folder) / "metrics.jsonl"
        self.num_lines = num_lines
        rows = _readable(self._path, step)[:num_lines]
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
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            self._events = EventFile(Path(folder) / "tensorboard", first_step=step + 1)
        except OSError as error:
            raise self._error(error) from error

    def write(self, *, step: int, split: str, **values: float) -> None:
        """One line: `step`, `split` and the values that apply (loss, accuracy, lr, seconds, …)."""
        try:
            self._file.write(_line({"step": step, "split": split, **values}))
            self._file.flush()
            self.num_lines += 1
            for name, value in values.items():
                self._events.scalar(f"{split}/{name}", value, step)
        except OSError as error:
            raise self._error(error) from error

    def sync(self) -> None:
        """Forces the lines onto the disk; done before a checkpoint that counts on them."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._events.flush()
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        try:
            self._file.close()
            self._events.close()
        except OSError as error:
            raise self._error(error) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except RequestError:
            if error is None:  # else what went wrong first is the better story
                raise

    def _error(self, error: OSError) -> RequestError:
        return RequestError(
            f"cannot write metrics to {self._path}: {error.strerror or error}; free some space and "
            "run the same command again: it goes on from the last checkpoint"
        )


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
