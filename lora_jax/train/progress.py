"""How far a training is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import rich.console
import rich.progress

# (step, loss, examples or tokens per second): the latter may be None where they are not known yet
Show = Callable[[int, float | None, float | None], None]
# (name, num_steps, *, start, enabled, unit) -> a context manager that gives a Show
ShowWith = Callable[..., contextlib.AbstractContextManager[Show]]
# What comes after the last step, of which nothing is shown.
EVALUATING = "evaluating"


@contextlib.contextmanager
def show_progress(
    name: str,
    num_steps: int,
    *,
    start: int = 0,
    enabled: bool = True,
    unit: str = "examples",
    stream: TextIO | None = None,
    every_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Show]:
    """Yields `show(step, loss, rate)`, to be called as often as one likes; a rate is `unit`s a
    second.

    On a terminal it moves a bar with the time left. Elsewhere it prints a line to `stream`
    (standard error) every `every_s` seconds, and one at the last step, which evaluation follows.
    Not `enabled`, it does nothing.
    """
    out: TextIO = stream or sys.stderr
    if not enabled:
        yield lambda step, loss, rate: None
    elif out.isatty():
        with _bar(name, num_steps, start, unit, out) as show:
            yield show
    else:
        yield _lines(name, num_steps, start, unit, out, every_s, clock)


@contextlib.contextmanager
def _bar(name: str, num_steps: int, start: int, unit: str, stream: TextIO) -> Iterator[Show]:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[values]}"),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(file=stream)
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=num_steps, completed=start, values="")

        def show(step, loss, rate):
            words = _values(loss, rate, unit)
            if step >= num_steps:
                words = "  ".join(filter(None, [words, EVALUATING]))
            bar.update(task, completed=step, values=words)

        yield show


def _lines(name, num_steps, start, unit, stream, every_s, clock) -> Show:
    begun = clock()
    printed, ended = begun, False

    def show(step, loss, rate):
        nonlocal printed, ended
        now = clock()
        ends = step >= num_steps and not ended
        if not ends and now - printed < every_s:
            return
        printed, ended = now, ended or ends
        left = (now - begun) / max(1, step - start) * (num_steps - step)
        words = [
            f"{name}: step {step}/{num_steps}",
            _values(loss, rate, unit),
            f"{clock_time(left)} left" if step < num_steps else EVALUATING,
        ]
        print("  ".join(word for word in words if word), file=stream, flush=True)

    return show


def _values(loss: float | None, rate: float | None, unit: str) -> str:
    words = []
    if loss is not None:
        words.append(f"loss {loss:.4f}")
    if rate is not None:
        words.append(f"{rate:,.0f} {unit}/s")
    return "  ".join(words)


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
