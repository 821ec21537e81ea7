"""Where a pack lies on a mesh: its cells over `cell`, and each as one cell does over the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.methods import Method
from lora_jax.parallel.placement import Placement


@dataclasses.dataclass(frozen=True, eq=False)
class CellPlacement:
    """Shardings of what a pack's programs take; `method` binds any of its cells.

    Leaves have a leading axis of cells, whose number must be a multiple of `num_parts`: each part
    of the mesh has its own, and no step of one tells another anything.
    """

    placement: Placement
    method: Method

    @property
    def num_parts(self) -> int:
        """Into how many parts the cells are divided."""
        return self.placement.mesh.shape["cell"]

    def of_state(self, state: Any) -> Any:
        """Shardings of a `TrainState` of K cells: of each cell those it has alone."""
        return self._stacked(self.placement.state(self.method, _one(state)))

    def of_trainable(self, trainable: Any) -> Any:
        """Of the trainable trees of K cells."""
        return self._stacked(self.placement.trainable(self.method, _one(trainable)))

    def of_data(self, data: Any) -> Any:
        """Of what `Pack.data` gives of K cells."""
        return self._stacked(jax.tree.map(lambda x: self.placement.replicated, data))

    def of_batch(self, batch: Any, *, stacked: bool) -> Any:
        """Of a batch that all share, or (`stacked`) of one for each of K cells."""
        if not stacked:
            return self.placement.batch(batch)
        return self._stacked(self.placement.batch(_one(batch)))

    def _stacked(self, of_one: Any) -> Any:
        return jax.tree.map(
            lambda where: NamedSharding(where.mesh, PartitionSpec("cell", *where.spec)), of_one
        )


def _one(tree: Any) -> Any:
    """Shapes of one cell of a stack of them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], x.dtype), tree)
