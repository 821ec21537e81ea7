"""A cell in training: its progress, and the schedule that it shares with the other cells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lora_jax.train.bookkeeping import Bookkeeping


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all cells of a training share: its length, the intervals in steps, and the patience.

    `eval_every` of 0 evaluates once, after the last step; `checkpoint_every` of 0 never saves.
    """

    num_steps: int
    eval_every: int
    patience: int
    log_every: int = 50
    checkpoint_every: int = 0


@dataclasses.dataclass
class TrainingCell:
    """One cell and its progress. `settings` has its `name` and the peak learning rate `lr`.

    `error` says why the cell ended without a result. `rate` is the weight (examples, tokens) per
    second of its last logged steps.
    """

    settings: Any
    progress: Bookkeeping = dataclasses.field(default_factory=Bookkeeping)
    error: str = ""
    rate: float | None = None
    _weight: float = 0.0
    _logged_at: float = 0.0

    @classmethod
    def on_mesh(cls, settings: Any, mesh: str) -> TrainingCell:
        """A cell before its first step."""
        return cls(settings, Bookkeeping().on_mesh(mesh))

    @property
    def ended(self) -> bool:
        return bool(self.progress.stopped or self.error)

    def add(self, **changes: Any) -> None:
        """Changes fields of the progress."""
        self.progress = dataclasses.replace(self.progress, **changes)

    def begin(self) -> None:
        """Rates count from here on, also where the cell was restored."""
        self._logged_at = self.progress.seconds.get("train", 0.0)

    def take_steps(self, rows: Sequence[tuple[float, ...]]) -> None:
        """Notes steps as (step, loss, correct, weight, gradient norm)."""
        if rows:
            self._weight += sum(row[3] for row in rows)
            self.add(window=self.progress.window + tuple(rows), step=int(rows[-1][0]))

    def log(self) -> dict[str, float]:
        """Empties the window of steps; returns their means and sets `rate`."""
        self.progress, values = self.progress.after_logging()
        seconds = self.progress.seconds.get("train", 0.0)
        elapsed = seconds - self._logged_at
        self.rate = self._weight / elapsed if elapsed > 0 else None
        self._logged_at, self._weight = seconds, 0.0
        return values

    def evaluate(self, values: dict[str, float], schedule: Schedule) -> None:
        """Notes an evaluation: the best so far, and whether to stop."""
        self.progress = self.progress.after_evaluation(
            values["loss"],
            values.get("accuracy", math.nan),
            patience=schedule.patience,
            num_steps=schedule.num_steps,
        )
