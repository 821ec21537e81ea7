"""What training a pack of configs needs: its program, its frozen base, its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.data.batches import OF_TOKENS
from lora_jax.parallel.cells import CellPlacement
from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.program import PackedProgram
from lora_jax.sweeps.runner import Ready
from lora_jax.train.build import Base, accumulate_of
from lora_jax.train.cell import Cell
from lora_jax.train.evaluate import make_scores
from lora_jax.train.loss import loss_settings, make_loss
from lora_jax.train.optimizer import make_optimizer


class PackBatches:
    """Each cell's own training batches, stacked: in one schedule of shapes, with data of its own.

    Step n's are a function of n, so a resumed pack needs no position.
    """

    def __init__(self, cells: Sequence[Cell], base: Base):
        self._sources = {cell.name: base.train_batches_of(cell.config).source for cell in cells}
        self._validation = base.eval_batches_of(cells[0].config)[0]
        self._longest = base.buckets[-1]

    @property
    def fingerprints(self) -> list[str]:
        """Of all that decides each cell's schedule."""
        return [source.fingerprint for source in self._sources.values()]

    def at(self, step: int, cells: Sequence[Cell]) -> dict[str, np.ndarray]:
        """The batches of the step that comes after `step` others, with an axis of cells."""
        each = [self._sources[cell.name][step] for cell in cells]
        return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

    def widest(self, cells: Sequence[Cell]) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the longest bucket's batch."""
        return self._longest_of(self._sources[cells[0].name][0], len(cells))

    def widest_evaluation(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the longest bucket's evaluation batch, which all cells share."""
        batch = dict(self._validation[0])
        return self._longest_of({k: x for k, x in batch.items() if k not in ("index", "weights")})

    def _longest_of(self, batch: dict, *lanes: int) -> dict[str, jax.ShapeDtypeStruct]:
        found = {}
        for name, array in batch.items():
            own = (*array.shape[:-1], self._longest) if name in OF_TOKENS else array.shape
            found[name] = jax.ShapeDtypeStruct((*lanes, *own), array.dtype)
        return found


def make_ready(pack: Pack, base: Base, *, at_once: int) -> Ready:
    """What training `pack` needs; nothing is compiled yet. `at_once` as in `PackedProgram`."""
    first = pack.cells[0]
    config = first.config

    def tx_of(cell: Cell) -> Any:
        # All but rate and decay agrees, in other packs that use this program, too.
        return cell.method.optimizer(make_optimizer(cell.config.optimizer, pack.num_steps))

    placement = cell_placement = constrain = None
    if base.placement is not None:
        placement, constrain = base.placement, base.placement.constrain
        placement.check_batch(config.data.batch_size, accumulate_of(config))
        cell_placement = CellPlacement(placement, pack.union)
    shared: dict[str, Any] = {"task": base.task, "constrain": constrain}
    program = PackedProgram(
        make_loss(base.model.apply, pack, **shared, **loss_settings(config.train)),
        make_scores(base.model.apply, pack, **shared),
        tx_of,
        tx_of(first),
        batch_axis=0,
        at_once=at_once,
        accumulate=accumulate_of(config),
        placement=cell_placement,
    )

    def params_of(cell: Cell) -> Any:
        return base.model_of(cell.seed).params

    # A new head that stays frozen is that of the seed, which all cells of the pack share then.
    frozen = first.method.init(jax.random.key(0), params_of(first))[1]
    if placement is not None:
        frozen = jax.device_put(frozen, placement.params(frozen))
    batches = PackBatches(pack.cells, base)
    return Ready(pack, program, params_of, frozen, batches, batches.widest_evaluation)
