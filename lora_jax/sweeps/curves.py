"""What `lj.sweep` keeps of a pack on its way: every step's loss and every look, in memory."""

from __future__ import annotations

import numpy as np

from lora_jax.sweeps.engine import Keeper, PackTraining
from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.results import CellResult
from lora_jax.train.progress import Show


class Curves(Keeper):
    """The curves of a pack's cells."""

    def __init__(self, plan: Planned, show: Show):
        self._losses: list[list[float]] = [[] for _ in plan.cells]
        self._validation: list[list[tuple[int, float]]] = [[] for _ in plan.cells]
        self._show = show

    def stepped(self, k, rows):
        self._losses[k] += [row[1] for row in rows]

    def validated(self, training, k, loss, accuracy):
        self._validation[k].append((training.step, loss))

    def show(self, training):
        self._show(training.step, training.mean_loss(), None)

    def results(self, training: PackTraining, number: int) -> list[CellResult]:
        """One result a cell, in their order."""
        return [
            CellResult(
                name=cell.settings.name,
                settings=cell.settings.settings,
                method=cell.settings.method,
                losses=np.asarray(self._losses[k], np.float32),
                validation=tuple(self._validation[k]),
                best_step=cell.books.best_step,
                best_loss=cell.books.best_loss if self._validation[k] else None,
                trainable=training.trainable_of(k),
                num_trainable=training.plan.counts[k],
                stopped=cell.books.stopped,
                error=cell.error,
                seconds=sum(cell.books.seconds.values()) - cell.books.seconds.get("compile", 0.0),
                compile_seconds=cell.books.seconds.get("compile", 0.0),
                pack=number,
                width=len(training.cells),
            )
            for k, cell in enumerate(training.cells)
        ]
