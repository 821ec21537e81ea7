"""What training a pack of configs needs: its program, its frozen base, its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.data.batches import OF_TOKENS
from lora_jax.parallel.cells import CellPlacement
from lora_jax.sweeps.cells import Cell
from lora_jax.sweeps.groups import Group
from lora_jax.sweeps.plan import Planned
from lora_jax.sweeps.program import PackedProgram
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.build import Base, accumulate_of
from lora_jax.train.evaluate import make_scores
from lora_jax.train.loss import loss_settings, make_loss
from lora_jax.train.optimizer import make_optimizer


class PackBatches:
    """Each cell's own training batches, stacked: in one schedule of shapes, with data of its own.

    Step n's are a function of n, so a resumed pack needs no position.
    """

    def __init__(self, cells: Sequence[Cell], base: Base):
        self._sources = {cell.name: base.train_batches_of(cell.config).source for cell in cells}
        self._looks = base.eval_batches_of(cells[0].config)["validation"]
        self._longest = base.buckets[-1]

    @property
    def fingerprints(self) -> list[str]:
        """Of all that decides each cell's schedule."""
        return [source.fingerprint for source in self._sources.values()]

    def at(self, step: int, cells: Sequence[CellSettings]) -> dict[str, np.ndarray]:
        """The batches of the step that comes after `step` others, with an axis of cells."""
        each = [self._sources[cell.name][step] for cell in cells]
        return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

    def widest(self, cells: Sequence[CellSettings]) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the longest bucket's batch."""
        one = self._longest_of(self._sources[cells[0].name][0])
        return {
            name: jax.ShapeDtypeStruct((len(cells), *like.shape), like.dtype)
            for name, like in one.items()
        }

    def widest_evaluation(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the longest bucket's evaluation batch, which all cells share."""
        batch = dict(self._looks[0])
        return self._longest_of({k: x for k, x in batch.items() if k not in ("index", "weights")})

    def _longest_of(self, batch: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: self._like(name, array) for name, array in batch.items()}

    def _like(self, name: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (*array.shape[:-1], self._longest) if name in OF_TOKENS else array.shape
        return jax.ShapeDtypeStruct(shape, array.dtype)


@dataclasses.dataclass(frozen=True)
class Ready:
    """A group with its program and data, ready to train at any width."""

    group: Group
    base: Base
    program: PackedProgram
    frozen: Any
    batches: PackBatches

    @property
    def plan(self) -> Planned:
        return self.group.plan

    @property
    def evaluation(self) -> Any:
        """The shapes of the largest batch of an evaluation."""
        return self.batches.widest_evaluation()

    def params_of(self, cell: CellSettings) -> Any:
        """The params tree that a cell begins with."""
        return self.base.model_of(cell.seed).params


def make_ready(group: Group, base: Base, *, at_once: int) -> Ready:
    """What training `group` needs; nothing is compiled yet. `at_once` as in `PackedProgram`."""
    first, plan = group.cells[0].config, group.plan

    def tx_of(cell: CellSettings):
        # All else agrees, in other packs that use this program, too.
        own = dataclasses.replace(first.optimizer, lr=cell.lr, weight_decay=cell.weight_decay)
        return cell.method.optimizer(make_optimizer(own, group.num_steps))

    place = None if base.placement is None else CellPlacement(base.placement, plan.pack.union)
    if base.placement is not None:
        base.placement.check_batch(first.data.batch_size, accumulate_of(first))
    constrain = None if base.placement is None else base.placement.constrain
    loss = make_loss(
        base.model.apply, plan.pack, task=base.task, constrain=constrain,
        **loss_settings(first.train),
    )  # fmt: skip
    program = PackedProgram(
        loss,
        make_scores(base.model.apply, plan.pack, task=base.task, constrain=constrain),
        tx_of,
        tx_of(plan.cells[0]),
        batch_axis=0,
        at_once=at_once,
        accumulate=accumulate_of(first),
        place=place,
    )
    # A new head that stays frozen is that of the seed, which all cells of the group share then.
    params = base.model_of(plan.cells[0].seed).params
    frozen = plan.cells[0].method.init(jax.random.key(0), params)[1]
    if place is not None:
        frozen = jax.device_put(frozen, base.placement.params(frozen))
    return Ready(group, base, program, frozen, PackBatches(group.cells, base))
