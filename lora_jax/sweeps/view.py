"""A sweep as it goes: cells done, running, failed, waiting; loss; time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lora_jax.train.progress import EVALUATING, Output, Show, clock_time


class SweepView(Output):
    """Two bars on a terminal, lines elsewhere; not `enabled`, only what `say` is given.

    The time left is that of the steps to come, each cell's counted alike, at the pace so far.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._total = self._running = self._done = self._failed = 0
        self._work = self._worked = self._skipped = 0.0
        if self.bars is not None:
            self._whole = self.bars.add_task("sweep", total=1.0, values="")

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
        self, name: str, num_steps: int, *, start: int = 0, enabled: bool = True, unit: str = ""
    ) -> Iterator[Show]:
        """As `train.progress.show_progress`: a bar of its own for what is running."""
        cells = max(1, self._running)
        self._skipped += cells * start

        def line_of(step: int, values: str) -> str:
            come = f"{name} step {step}/{num_steps}"
            come += f", {EVALUATING}" if step >= num_steps else ""
            return "  ".join(filter(None, [self._counts(step), come, values]))

        with self.shown(name, num_steps, start, line_of) as show:

            def show_values(step: int, loss: float | None, rate: float | None) -> None:
                show(step, "" if loss is None else f"loss {loss:.4f}")
                if self.bars is not None:
                    done = (self._worked + cells * step) / max(1.0, self._work)
                    self.bars.update(self._whole, completed=done, values=self._counts(step))

            yield show_values if self.enabled and enabled else lambda step, loss, rate: None

    def _counts(self, step: int) -> str:
        waiting = self._total - self._done - self._failed - self._running
        words = [f"{self._done} done", f"{self._running} running"]
        words += [f"{self._failed} failed"] if self._failed else []
        words += [f"{waiting} waiting"] if waiting else []
        worked = self._worked + self._running * step
        if (here := worked - self._skipped) <= 0:
            return ", ".join(words)
        left = (self.clock() - self.begun) / here * max(0.0, self._work - worked)
        return f"{', '.join(words)}; {clock_time(left)} left"
