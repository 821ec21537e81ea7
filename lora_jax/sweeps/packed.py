"""A pack in the training loop: its cells in the lanes of a mapped program, and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.program import PackedProgram, lane_of, with_lanes
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.cell import Schedule
from lora_jax.train.loop import Callback, Training, Validate


class PackTraining(Training):
    """The cells of `plan` in training. `params` has the tree that each begins with, `base` is the
    frozen part of it, which all share."""

    def __init__(
        self,
        plan: Planned,
        program: PackedProgram,
        params: Sequence[Any],
        base: Any,
        batches: Any,
        validate: Validate,
        schedule: Schedule,
        callbacks: Sequence[Callback] = (),
    ):
        data = plan.pack.data()

        def frozen_of(cells: Sequence[int]) -> tuple[Any, Any]:
            return program.take("data", data, cells), base

        self.plan = plan
        state = program.init(plan.pack, plan.cells, params)
        super().__init__(
            plan.cells, program, state, frozen_of, batches, validate, schedule, callbacks
        )

    def trainable_of(self, k: int) -> Any:
        """Cell k's best trainable, at its own rank and targets; None if there never was one."""
        if not self.cells[k].progress.best_step:
            return None
        return self.plan.pack.unpack(lane_of(self.best, k), k)

    def groups(self) -> dict[str, Any]:
        """The arrays of a checkpoint."""
        return {"state": self.state, **({} if self.best is None else {"best": self.best})}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its arrays, as JSON values."""
        cells = [{"books": cell.progress.to_json(), "error": cell.error} for cell in self.cells]
        return {
            "step": self.step, "looked": self.evaluated, "slots": self.lanes, "cells": cells,
            "num_best": self._program.padded(len(self.cells)),
        }  # fmt: skip

    def like(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Shapes of the arrays that the checkpoint of these facts holds."""
        num_best = facts.get("num_best", len(self.cells))
        return {
            "state": with_lanes(self.state, len(facts["slots"])),
            "best": with_lanes(self.state.trainable, num_best),
        }

    def go_on_from(
        self, groups: dict[str, Any], facts: dict[str, Any], changes: tuple[str, ...]
    ) -> None:
        """Goes on from a checkpoint; `changes` are those of `train/numerics.py` since."""
        for cell, saved in zip(self.cells, facts["cells"], strict=True):
            cell.progress = Bookkeeping.from_json(saved["books"]).with_changes(changes)
            cell.error = saved["error"]
        self.restore(
            facts["step"], facts["looked"], facts["slots"], groups["state"], groups.get("best")
        )
