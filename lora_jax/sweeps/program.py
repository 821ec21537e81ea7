"""The compiled step and score of a pack: one program for each width and batch shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.parallel.cells import CellPlacement
from lora_jax.parallel.mesh import mesh_text
from lora_jax.parallel.placement import place
from lora_jax.sweeps.pack import Pack
from lora_jax.train.build import keys_of
from lora_jax.train.cell import Cell
from lora_jax.train.compilation import CompiledByShape, memory_of
from lora_jax.train.loss import LossFunction
from lora_jax.train.memory import num_bytes
from lora_jax.train.program import Program
from lora_jax.train.state import TrainState
from lora_jax.train.step import step_function


def default_at_once() -> int:
    """1 on CPU, 0 (all) elsewhere.

    An accelerator reads each weight of the base once for all cells that are side by side. A CPU is
    busy with arithmetic already, and the cells' activations together outgrow its caches: 8 cells of
    MiniLM, 32 x 32 tokens, took 3.2-3.8 s a step side by side and 2.3-2.6 s one after another.
    """
    return 1 if jax.default_backend() == "cpu" else 0


def over_cells(
    of_cell: Callable, at_once: int, batch_axis: int | None, *, num_parts: int = 1
) -> Callable:
    """`of_cell(own, (data, base), batch)` for all cells in one program.

    The cells' own trees and data have their axis, the base has none: one copy of it serves all.
    `num_parts` is over how many parts of a mesh they are divided, `at_once` in each.
    """

    def of_all(own, frozen, batch):
        data, base = frozen

        def one(part):
            return of_cell(part[0], (part[1], base), batch if batch_axis is None else part[2])

        parts = (own, data) if batch_axis is None else (own, data, batch)

        def in_turn(parts):
            if not at_once:
                return jax.vmap(one)(parts)
            return jax.lax.map(one, parts, batch_size=None if at_once == 1 else at_once)

        if num_parts == 1:
            return in_turn(parts)
        # Named, so that what is said of a cell's activations keeps each cell where it is.
        if not at_once:
            return jax.vmap(one, spmd_axis_name="cell")(parts)
        divided = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), parts)
        found = jax.vmap(in_turn, spmd_axis_name="cell")(divided)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    return of_all


class PackedProgram(Program):
    """What packs with the same union share: the step and the score, mapped over the cells.

    `loss(trainable, frozen, batch, key) -> (loss, sums)` and `scores(trainable, frozen, batch)` are
    of one cell, where `frozen` is what `Pack.bind` takes; `tx_of(cell)` makes one cell's optimizer,
    of one structure for all, since what differs is in its state (`tx` is any of them); `batch_axis`
    is 0 where each cell has batches of its own, None where all share them; `at_once` cells are
    computed side by side, chunk after chunk (0: all); `accumulate` is into how many parts a step
    cuts its batch; `placement` puts all of it on a mesh.
    """

    def __init__(
        self,
        loss: LossFunction,
        scores: Callable[[Any, Any, Any], Any],
        tx_of: Callable[[Cell], Any],
        tx: Any,
        *,
        batch_axis: int | None,
        at_once: int,
        accumulate: int = 1,
        placement: CellPlacement | None = None,
    ):
        self.at_once, self._place, self._tx_of = at_once, placement, tx_of
        self.num_parts = placement.num_parts if placement else 1
        step = step_function(loss, tx, accumulate=accumulate)
        step = over_cells(step, at_once, batch_axis, num_parts=self.num_parts)
        scores = over_cells(scores, at_once, None, num_parts=self.num_parts)
        jitted = jax.jit(step, donate_argnums=0) if placement is None else _OnMesh(step)
        kind = "shared batch" if batch_axis is None else "batch"
        super().__init__(
            CompiledByShape(jitted, self._placer(kind)),
            CompiledByShape(jax.jit(scores), self._placer("shared batch")),
            mesh_text(placement.placement.mesh) if placement else "",
        )

    def _placer(self, kind: str) -> Callable[[Any], Any] | None:
        """Puts batches, or their shapes, on the mesh."""
        if (placement := self._place) is None:
            return None
        shardings: dict[Any, Any] = {}

        def put(batch):
            leaves, treedef = jax.tree.flatten(batch)
            key = (treedef, *map(np.shape, leaves))
            if key not in shardings:
                shardings[key] = placement.of(kind, batch)
            return place(batch, shardings[key])

        return put

    def padded(self, count: int) -> int:
        """The lanes that `count` cells need: their number must be a multiple of `num_parts`."""
        return count + -count % self.num_parts

    def init(self, pack: Pack, params: Sequence[Any]) -> TrainState:
        """The cells' states before the first step, leaves with a leading axis K.

        `params` has a tree for each cell, which differ at most in what is trained whole.
        """
        keys = [keys_of(cell.seed) for cell in pack.cells]
        each = pack.init([key[1] for key in keys], params)
        txs = map(self._tx_of, pack.cells)
        opt_states = [tx.init(own) for tx, own in zip(txs, each, strict=True)]
        trainable, opt_state = _stack(*zip(each, opt_states, strict=True))
        return TrainState(
            step=jnp.zeros(len(each), jnp.int32),
            trainable=trainable,
            opt_state=opt_state,
            key=jnp.stack([key[2] for key in keys]),
        )

    def bytes_needed(self, state: Any, frozen: Any, batch: Any, evaluation: Any = None) -> int:
        """The bytes that a step or the scores of the batch `evaluation` hold, whichever is more.

        All arguments are arrays or shape structs. The best trainables are counted too, and for the
        scores the optimizer's state.
        """
        state, frozen = self._placed(state, frozen)
        needed = memory_of(self._step.compiled(state, frozen, batch))
        if evaluation is not None:
            scores = self._scores.compiled(state.trainable, frozen, evaluation)
            moments = num_bytes(state.opt_state, of_a_device=True)
            needed = max(needed, memory_of(scores) + moments)
        return needed + num_bytes(state.trainable, of_a_device=True)

    def _placed(self, state: Any, frozen: Any) -> tuple[Any, Any]:
        """Shapes with the sharding that arrays of `take` have; the base has its own."""
        if self._place is None:
            return state, frozen
        data, base = frozen
        data = place(as_shapes(data), self._place.of("data", data))
        return place(state, self._place.of("state", state)), (data, base)

    def finite(self, trainable: Any) -> np.ndarray:
        return jax.device_get(_finite(trainable))

    def take(self, kind: str, tree: Any, lanes: Sequence[int]) -> Any:
        """These lanes of a tree with an axis of them, lying as the programs have it."""
        leaves = jax.tree.leaves(tree)
        if not leaves:  # cells that differ in nothing have no data of their own
            return tree
        as_it_is = list(lanes) == list(range(leaves[0].shape[0]))
        if self._place is None:
            return tree if as_it_is else _take(tree, lanes)
        taking = functools.partial(_take, lanes=lanes)
        where = self._place.of(kind, jax.eval_shape(taking, tree))
        if as_it_is:
            return jax.device_put(tree, where)
        return jax.jit(taking, out_shardings=where)(tree)

    def keep(
        self, best: Any, new: Any, cells: Sequence[int], better: np.ndarray, count: int
    ) -> Any:
        """As `Program.keep`; without any `best` it is zero in all places."""
        if best is None:
            best = self.take("trainable", _zeros(new, count), range(count))
        keep = _keep
        if self._place is not None:
            keep = jax.jit(_keep, out_shardings=self._place.of("trainable", best))
        return keep(best, new, jnp.asarray(cells), jnp.asarray(better))


class _OnMesh:
    """The step on a mesh: its state comes back to where the next step takes it."""

    def __init__(self, step: Callable):
        self._step = step

    def lower(self, state: Any, frozen: Any, batch: Any) -> Any:
        out = (jax.tree.map(lambda x: x.sharding, state), None)
        jitted = jax.jit(self._step, donate_argnums=0, out_shardings=out)
        return jitted.lower(state, frozen, batch)


def as_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)


def with_lanes(tree: Any, count: int) -> Any:
    """The tree's shapes, with so many lanes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), tree)


@jax.jit
def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def _zeros(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), tree)


@jax.jit
def lane_of(tree: Any, lane: jax.Array) -> Any:
    """One lane of a tree with an axis of them."""
    return jax.tree.map(lambda leaf: leaf[lane], tree)


@jax.jit
def _finite(trainable: Any) -> jax.Array:
    leaves = jax.tree.leaves(trainable)
    each = [jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in leaves]
    return jnp.stack(each).all(axis=0)


def _take(tree: Any, lanes: Sequence[int]) -> Any:
    index = jnp.asarray(lanes, jnp.int32)
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), tree)


@jax.jit
def _keep(best: Any, new: Any, cells: jax.Array, better: jax.Array) -> Any:
    def put(old, x):
        chosen = better.reshape(-1, *[1] * (x.ndim - 1))
        return old.at[cells].set(jnp.where(chosen, x, old[cells]))

    return jax.tree.map(put, best, new)
