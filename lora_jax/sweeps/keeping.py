"""What a pack under way knows of its cells, and whom it tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.bookkeeping import Bookkeeping

if TYPE_CHECKING:
    from lora_jax.sweeps.engine import PackTraining


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all cells of a pack share: how long, when to look, log and save, how long to hope.

    `eval_every` of 0 looks once, after the last step; `checkpoint_every` of 0 never saves.
    """

    num_steps: int
    eval_every: int
    patience: int
    log_every: int = 50
    checkpoint_every: int = 0


@dataclasses.dataclass
class PackedCell:
    """What one cell has done so far."""

    settings: CellSettings
    books: Bookkeeping = dataclasses.field(default_factory=Bookkeeping)
    error: str = ""

    @property
    def ended(self) -> bool:
        return bool(self.books.stopped or self.error)


class Keeper:
    """Who is told what a pack does; this one keeps nothing and never asks to stop.

    `k` is a cell's number in the plan.
    """

    def stepped(self, k: int, rows: Sequence[tuple[float, ...]]) -> None:
        """Steps were taken: (step, loss, correct, weight, gradient norm) of each."""

    def logged(self, training: PackTraining, k: int, values: dict[str, float]) -> None:
        """What the steps since the last log came to."""

    def validated(self, training: PackTraining, k: int, loss: float, accuracy: float) -> None:
        """The cell was looked at."""

    def save(self, training: PackTraining) -> None:
        """A checkpoint is due."""

    def stop_requested(self) -> str:
        """Why to stop, "" to go on."""
        return ""

    def show(self, training: PackTraining) -> None:
        """The pack has come this far."""
