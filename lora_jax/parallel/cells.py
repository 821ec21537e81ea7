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

    def of(self, kind: str, tree: Any) -> Any:
        """Shardings of a "state", a "trainable", what `Pack.data` gives ("data") or a "batch" of K
        cells: of each cell those it has alone. A "shared batch" has no cells."""
        placement, one = self.placement, tree if kind == "shared batch" else _one(tree)
        if "batch" in kind:
            of_one = placement.batch(one)
        elif kind == "state":
            of_one = placement.state(self.method, one)
        elif kind == "trainable":
            of_one = placement.trainable(self.method, one)
        else:
            of_one = jax.tree.map(lambda x: placement.replicated, one)
        if kind == "shared batch":
            return of_one
        return jax.tree.map(
            lambda where: NamedSharding(where.mesh, PartitionSpec("cell", *where.spec)), of_one
        )


def _one(tree: Any) -> Any:
    """Shapes of one cell of a stack of them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], x.dtype), tree)
