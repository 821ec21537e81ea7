"""TensorBoard's event files, one folder per cell."""

from __future__ import annotations

import os
import struct
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.trackers.base import library


class TensorBoard:
    """Writes `FOLDER/NAME/tensorboard/events…`; needs tensorboardX.

    Runs on disk have it in any case, under `WORKDIR/cells`.

    Args:
      folder: of all runs; what `tensorboard --logdir` takes.

    Raises:
      ModuleNotFoundError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        library("tensorboardX", "TensorBoard")

    def start(self, name: str, group: str, settings: Mapping[str, Any], run_id: str) -> int | None:
        # `tensorboardX.SummaryWriter` writes through a thread, which dies of a full disk; its queue
        # of ten then blocks the training for good.
        from tensorboardX.event_file_writer import EventsWriter

        folder = self._folder / _as_folder(name) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        last = max(steps_in(folder), default=None)
        # The library names files by the second; two within one second would be one.
        unique = f".{os.getpid()}.{time.time_ns()}"
        self._events = EventsWriter(str(folder / "events"), unique)
        return last

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        proto: Any = library("tensorboardX.proto.event_pb2", "TensorBoard")
        # All in one event, so that a step killed in its writing is there as a whole or not at all.
        event = proto.Event(wall_time=time.time(), step=step)
        for tag, number in numbers.items():
            event.summary.value.add(tag=tag, simple_value=number)
        self._events.write_event(event)
        self._events.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._events.close()


def steps_in(folder: Path) -> Iterator[int]:
    """The steps that event files have numbers of."""
    proto: Any = library("tensorboardX.proto.event_pb2", "TensorBoard")
    for path in folder.glob("events*"):
        for record in _records(path.read_bytes()):
            event = proto.Event.FromString(record)
            if event.summary.value:
                yield event.step


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), the record, another (4).

    A torn last one, which a killed process leaves, is left out.
    """
    while len(content) >= 12:
        (length,) = struct.unpack("<Q", content[:8])
        if len(content) < 16 + length:
            return
        yield content[12 : 12 + length]
        content = content[16 + length :]


def _as_folder(name: str) -> str:
    """A name as that of one folder, others as others.

    >>> _as_folder("r8-s0"), _as_folder("lora-.*/kernel")
    ('r8-s0', 'lora-.%2A%2Fkernel')
    """
    quoted = urllib.parse.quote(name, safe=" +,=@")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
