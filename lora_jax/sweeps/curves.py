"""What `lj.sweep` keeps of a pack, in memory: the loss of every step and every evaluation."""

from __future__ import annotations

import numpy as np

from lora_jax.sweeps.packed import PackTraining
from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.results import CellResult
from lora_jax.train.callbacks import Display
from lora_jax.train.progress import Show


class Curves(Display):
    """The curves of a pack's cells; shows the mean of their last losses."""

    def __init__(self, plan: Planned, show: Show):
        super().__init__(lambda step, loss, rate: show(step, loss, None))
        self._losses: list[list[float]] = [[] for _ in plan.cells]
        self._validation: list[list[tuple[int, float]]] = [[] for _ in plan.cells]

    def stepped(self, training, k, rows):
        self._losses[k] += [row[1] for row in rows]

    def evaluated(self, training, k, loss, accuracy):
        self._validation[k].append((training.step, loss))

    def results(self, training: PackTraining, number: int) -> list[CellResult]:
        """One result per cell, in their order."""
        return [
            CellResult(
                name=cell.settings.name,
                settings=cell.settings.settings,
                method=cell.settings.method,
                losses=np.asarray(self._losses[k], np.float32),
                validation=tuple(self._validation[k]),
                best_step=cell.progress.best_step,
                best_loss=cell.progress.best_loss if self._validation[k] else None,
                trainable=training.trainable_of(k),
                num_trainable=training.plan.counts[k],
                stopped=cell.progress.stopped,
                error=cell.error,
                seconds=sum(cell.progress.seconds.values())
                - cell.progress.seconds.get("compile", 0.0),
                compile_seconds=cell.progress.seconds.get("compile", 0.0),
                pack=number,
                width=len(training.cells),
            )
            for k, cell in enumerate(training.cells)
        ]
