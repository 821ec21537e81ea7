"""TensorBoard event files, written where we stand: an error reaches us, nothing hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class EventFile:
    """Scalars to one new event file in `folder`; raises `OSError` as it happens.

    (`tensorboardX.SummaryWriter` writes through a thread, which dies of a full disk; its queue of
    ten then blocks the training for good.)
    """

    def __init__(self, folder: str | os.PathLike, *, first_step: int):
        """A new file; TensorBoard drops what older ones in the folder say from `first_step` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        Path(folder).mkdir(parents=True, exist_ok=True)
        # The library names files by the second; two within one second would be one.
        unique = f".{os.getpid()}.{time.time_ns()}"
        self._writer = EventsWriter(str(Path(folder) / "events"), unique)
        if first_step > 1:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=first_step, session_log=start))

    def scalar(self, name: str, value: float, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self._write(Event(step=step, summary=scalar(name, value)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
