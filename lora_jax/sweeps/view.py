"""A sweep as it goes: cells done, running, failed, waiting; loss; time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import rich.console
import rich.progress

from lora_jax.io.untrusted import escaped
from lora_jax.train.progress import EVALUATING, clock_time


class SweepView(contextlib.AbstractContextManager):
    """Two bars on a terminal, lines elsewhere; not `enabled`, only what `say` is given.

    The time left is that of the steps to come, each cell's counted alike, at the pace so far.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stderr
        self._enabled, self._every_s, self._clock = enabled, every_s, clock
        self._begun = self._printed = clock()
        self._total = self._running = self._done = self._failed = 0
        self._work = self._worked = self._skipped = 0.0
        self._last = ""
        self._bars: rich.progress.Progress | None = None
        if enabled and self._stream.isatty():
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[values]}"),
                console=rich.console.Console(file=self._stream),
            )
            self._whole = self._bars.add_task("sweep", total=1.0, values="")

    def __enter__(self) -> SweepView:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """One line, above the bars."""
        text = escaped(text)
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def expect(self, num_cells: int, num_steps: float = 0) -> None:
        """More cells are known; `num_steps` is the sum of the steps they will take."""
        self._total += num_cells
        self._work += num_steps

    def ended(self, *, failed: bool) -> None:
        """One more cell has its result."""
        self._failed += failed
        self._done += not failed

    @contextlib.contextmanager
    def running(self, num_cells: int, num_steps: int) -> Iterator[None]:
        """Around the training of that many cells of `num_steps` steps each."""
        self._running = num_cells
        try:
            yield
        finally:
            self._worked += num_cells * num_steps
            self._running = 0

    @contextlib.contextmanager
    def show_with(
        self,
        name: str,
        num_steps: int,
        *,
        start: int = 0,
        enabled: bool = True,
        unit: str = "examples",
    ):
        """As `train.progress.show_progress`: a bar of its own for what is running."""
        cells = max(1, self._running)
        self._skipped += cells * start
        bars = self._bars
        bar = bars and bars.add_task(name, total=num_steps, completed=start, values="")

        def show(step: int, loss: float | None, rate: float | None) -> None:
            come = f"step {step}/{num_steps}"
            if step >= num_steps:  # nothing is shown again until that is over
                come += f", {EVALUATING}"
            values = f"loss {loss:.4f}" if loss is not None else ""
            if bars is not None and bar is not None:
                bars.update(bar, completed=step, values=f"{come}  {values}")
                done = (self._worked + cells * step) / max(1.0, self._work)
                bars.update(self._whole, completed=done, values=self._counts(step))
                return
            now, line = self._clock(), f"{name} {come}"
            ends = step >= num_steps and line not in self._last
            if self._enabled and (ends or now - self._printed >= self._every_s):
                self._printed, self._last = now, line
                self.say("  ".join(filter(None, [self._counts(step), line, values])))

        try:
            yield show if self._enabled and enabled else lambda step, loss, rate: None
        finally:
            if bars is not None and bar is not None:
                bars.remove_task(bar)

    def _counts(self, step: int) -> str:
        waiting = self._total - self._done - self._failed - self._running
        words = [f"{self._done} done", f"{self._running} running"]
        words += [f"{self._failed} failed"] if self._failed else []
        words += [f"{waiting} waiting"] if waiting else []
        worked = self._worked + self._running * step
        if (here := worked - self._skipped) <= 0:
            return ", ".join(words)
        left = (self._clock() - self._begun) / here * max(0.0, self._work - worked)
        return f"{', '.join(words)}; {clock_time(left)} left"
