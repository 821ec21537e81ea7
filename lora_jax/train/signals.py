"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# The requests that are being taken now; there is one main thread, so one at most.
_active: list[Callable[[], str]] = []


class Interrupted(Exception):
    """A run was asked to stop and has saved its state; the message says how to go on."""

    exit_code = 130


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Yields `requested()`: the name of the signal that asked to stop, "" while none has.

    A second signal of the kind acts as it would have without this. Outside the main thread, where
    Python cannot take signals, nothing is ever requested. Within another of its kind it is the same
    one: what was asked of the whole is asked of its parts, and the other way round.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return
    if _active:
        yield _active[-1]
        return
    received: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])
        again = "; Ctrl-C again to leave at once" if number == signal.SIGINT else ""
        print(f"\n{received[-1]}: saving the state first{again}", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, note)
    _active.append(lambda: received[0] if received else "")
    try:
        yield _active[-1]
    finally:
        _active.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
