"""A pack in the training loop: its cells in the lanes of a mapped program, and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.program import lane_of, with_lanes
from lora_jax.sweeps.runner import Ready
from lora_jax.train.cell import Progress, Schedule
from lora_jax.train.loop import Training, Validate


class PackTraining(Training):
    """The cells of a pack in training."""

    def __init__(self, ready: Ready, validate: Validate, schedule: Schedule):
        pack, program, data = ready.pack, ready.program, ready.pack.data()

        def frozen_of(cells: Sequence[int]) -> tuple[Any, Any]:
            return program.take("data", data, cells), ready.frozen

        self.pack = pack
        program.begin_use()
        state = program.init(pack, list(map(ready.params_of, pack.cells)))
        super().__init__(pack.cells, program, state, frozen_of, ready.batches, validate, schedule)

    def trainable_of(self, k: int) -> Any:
        """Cell k's best trainable, at its own rank and targets; None if there never was one."""
        if not self.cells[k].progress.best_step:
            return None
        return self.pack.unpack(lane_of(self.best, k), k)

    def contents(self):
        cells = [{"books": cell.progress.to_json(), "error": cell.error} for cell in self.cells]
        training = {
            "step": self.step, "looked": self.evaluated, "slots": self.lanes, "cells": cells,
            "num_best": self._program.padded(len(self.cells)),
        }  # fmt: skip
        facts = {
            "training": training,
            "schedules": self._batches.fingerprints,
            "program": self._program.use().to_json(),
        }
        return {"state": self.state, **({} if self.best is None else {"best": self.best})}, facts

    def like(self, facts):
        training = facts["training"]
        num_best = training.get("num_best", len(self.cells))
        return {
            "state": with_lanes(self.state, len(training["slots"])),
            "best": with_lanes(self.state.trainable, num_best),
        }

    def go_on_from(self, groups, facts, changes):
        if facts["schedules"] != self._batches.fingerprints:
            raise RequestError(
                f"the checkpoints of {', '.join(cell.settings.name for cell in self.cells)} are of "
                "other data or batches than the configs name now; put the old data back, or choose "
                "another workdir"
            )
        training = facts["training"]
        for cell, saved in zip(self.cells, training["cells"], strict=True):
            cell.progress = Progress.from_json(saved["books"], changes)
            cell.error = saved["error"]
        self.restore(
            training["step"], training["looked"], training["slots"], groups["state"],
            groups.get("best"),
        )  # fmt: skip
        self._program.begin_use(**facts["program"])
