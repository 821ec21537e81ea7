"""How far a training is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import rich.console
import rich.progress

from lora_jax.io.untrusted import escaped

# (step, loss, examples or tokens per second): the latter may be None where they are not known yet
Show = Callable[[int, float | None, float | None], None]
# (name, num_steps, *, start, enabled, unit) -> a context manager that gives a Show
ShowWith = Callable[..., contextlib.AbstractContextManager[Show]]
# What comes after the last step, of which nothing is shown.
EVALUATING = "evaluating"


class Output(contextlib.AbstractContextManager):
    """Bars on a terminal, lines elsewhere: one every `every_s` seconds, none if not `enabled`."""

    def __init__(
        self,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream: TextIO = stream or sys.stderr
        self.enabled, self._every_s, self.clock = enabled, every_s, clock
        self.begun = self._printed = clock()
        self._last_end = ""
        self.bars: rich.progress.Progress | None = None
        if enabled and self._stream.isatty():
            self.bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[values]}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(file=self._stream),
            )

    def __enter__(self):
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, text: str) -> None:
        """One line, above the bars."""
        if self.bars is not None:
            self.bars.console.print(escaped(text), markup=False, highlight=False)
        else:
            print(escaped(text), file=self._stream, flush=True)

    @contextlib.contextmanager
    def shown(
        self, name: str, num_steps: int, start: int, line_of: Callable[[int, str], str]
    ) -> Iterator[Callable[[int, str], None]]:
        """Yields `show(step, values)` of one training, which ends with an evaluation.

        `line_of(step, values)` is what stands in a line.
        """
        bars = self.bars
        bar = bars and bars.add_task(name, total=num_steps, completed=start, values="")

        def show(step: int, values: str) -> None:
            if bars is not None and bar is not None:
                bars.update(bar, completed=step, values=f"{step}/{num_steps}  {values}")
                return
            now, end = self.clock(), name if step >= num_steps else ""
            if (end and end != self._last_end) or now - self._printed >= self._every_s:
                self._printed, self._last_end = now, end or self._last_end
                self.say(line_of(step, values))

        try:
            yield show
        finally:
            if bars is not None and bar is not None and len(bars.tasks) > 1:
                bars.remove_task(bar)  # the only one stays to be seen


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

    def line_of(step: int, values: str) -> str:
        left = (clock() - output.begun) / max(1, step - start) * (num_steps - step)
        time_left = f"{clock_time(left)} left" if step < num_steps else ""
        return "  ".join(filter(None, [f"{name}: step {step}/{num_steps}", values, time_left]))

    output = Output(enabled=enabled, stream=stream, every_s=every_s, clock=clock)
    with output, output.shown(name, num_steps, start, line_of) as show:

        def show_values(step: int, loss: float | None, rate: float | None) -> None:
            loss_text = "" if loss is None else f"loss {loss:.4f}"
            rate_text = "" if rate is None else f"{rate:,.0f} {unit}/s"
            end = EVALUATING if step >= num_steps else ""
            show(step, "  ".join(filter(None, [loss_text, rate_text, end])))

        yield show_values if enabled else lambda step, loss, rate: None


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
