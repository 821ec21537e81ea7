"""What came out of a sweep: one row a cell, as a tidy table or one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.cells import is_at_edge


@dataclasses.dataclass(frozen=True)
class CellResult:
    """One cell: its settings with their defaults, its curves, and what it trained.

    `losses` (steps,) float32: the training loss of each step that was taken. `validation`: pairs of
    step and loss, in order; `metrics`: pairs of step and the sweep's own metrics. `best_step`,
    `best_loss`: of the lowest validation loss (of the last step, where there is no validation;
    then `best_loss` is None). `trainable`: the cell's own tree
    at that step, true ranks and targets; None if there never was a good one. `method` binds and
    merges it. `num_trainable` counts its parameters, those trained whole included. `stopped` says
    why it ended; `error`, "" if all went well, what went wrong. `seconds` is the cell's share of
    its pack's training, `compile_seconds` of its compilation; `pack` numbers the pack from 1 (0:
    never begun), `width` counts the cells it began with; `group` is what tuning compares it within.
    """

    name: str
    settings: Mapping[str, Any]
    method: Any
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int = 0
    best_loss: float | None = None
    trainable: Any = None
    num_trainable: int = 0
    stopped: str = ""
    error: str = ""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    pack: int = 0
    width: int = 0
    metrics: tuple[tuple[int, Mapping[str, float]], ...] = ()
    group: str = ""

    @property
    def is_good(self) -> bool:
        """Whether there is something trained, and nothing went wrong."""
        return self.trainable is not None and not self.error

    def __repr__(self) -> str:
        """One line without the arrays."""
        state = f"error={self.error!r}" if self.error else f"best_loss={self.best_loss}"
        return (
            f"CellResult({self.name!r}, {state}, best_step={self.best_step}, "
            f"steps={len(self.losses)}, num_trainable={self.num_trainable})"
        )


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning one arm found: the best of its cells, and the basin it is the bottom of.

    `losses` are the validation losses at `values` (inf where a cell failed). `at_edge` says that
    `chosen` is the smallest or largest value tried: a better one may lie beyond.
    """

    name: str
    best: CellResult
    chosen: Any
    values: tuple[Any, ...]
    losses: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        return is_at_edge(self.chosen, self.values)


class SweepResults(Sequence):
    """The cells' results in the order of the cells; `results["name"]` finds one by name."""

    def __init__(self, rows: Sequence[CellResult], plan: str, tuned_by: str = ""):
        self._rows = tuple(rows)
        self.plan = plan
        self._tuned_by = tuned_by

    def __getitem__(self, key: int | str) -> CellResult:
        if isinstance(key, str):
            found = [row for row in self._rows if row.name == key]
            if not found:
                raise KeyError(f"no cell {key!r}; there are {[row.name for row in self._rows][:8]}")
            return found[0]
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[CellResult]:
        return iter(self._rows)

    def best(self) -> CellResult:
        """The cell with the lowest validation loss (the last training loss, where there is none).

        Raises `ValueError` if every cell failed.
        """
        best = min(self._rows, key=_score)
        if not best.is_good:
            raise ValueError("every cell failed; see each result's `error`")
        return best

    def tuned(self) -> list[Tuned]:
        """For each arm, the value that `tune` chose on validation, and from what.

        An arm whose every cell failed is left out. Raises `RequestError` without `tune`.
        """
        if not self._tuned_by:
            raise RequestError(
                "tuned() compares the values of one setting, and this sweep had none; give "
                "lora_jax.sweep(..., tune=(setting, values)), or take best()"
            )
        found = []
        for group in dict.fromkeys(row.group for row in self._rows if row.group):
            rows = [row for row in self._rows if row.group == group]
            losses = tuple(map(_score, rows))
            if min(losses) < math.inf:
                best = rows[losses.index(min(losses))]
                values = tuple(row.settings[self._tuned_by] for row in rows)
                chosen = best.settings[self._tuned_by]
                found.append(Tuned(group, best, chosen, values, losses))
        return found

    def to_pandas(self):
        """One row a cell: settings, losses, steps, parameters, seconds, `error` ("" if none)."""
        import pandas as pd

        return pd.DataFrame([_record(row) for row in self._rows])

    def __str__(self) -> str:
        columns = ["name", "best_loss", "last_train_loss", "steps", "num_trainable", "stopped"]
        frame = self.to_pandas()
        frame["stopped"] = frame["error"].where(frame["error"] != "", frame["stopped"])
        return frame[columns].to_string(index=False)

    def __repr__(self) -> str:
        return f"SweepResults({len(self)} cells)\n{self}"


def _record(row: CellResult) -> dict[str, Any]:
    names = ("num_trainable", "seconds", "compile_seconds", "pack", "width", "stopped", "error")
    return {
        "name": row.name,
        **({"group": row.group} if row.group else {}),
        **row.settings,
        "best_loss": row.best_loss,
        "best_step": row.best_step,
        **{f"best_{name}": x for name, x in dict(row.metrics).get(row.best_step, {}).items()},
        "last_train_loss": float(row.losses[-1]) if len(row.losses) else None,
        "steps": len(row.losses),
        **{name: getattr(row, name) for name in names},
    }


def _score(row: CellResult) -> float:
    """What cells are compared by; inf for one that failed."""
    if not row.is_good:
        return math.inf
    if row.best_loss is not None:
        return row.best_loss
    return float(row.losses[-1]) if len(row.losses) else math.inf
