"""The compiled step and score of a pack: one program for each width and batch shape."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
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
from lora_jax.train.compilation import compile_ahead, memory_of
from lora_jax.train.evaluate import Evaluation, evaluate_stacked
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


@dataclasses.dataclass
class Use:
    """Which programs a pack ran: bytes of the largest (on one device), batch shapes (lanes, B, T)
    of the steps."""

    memory_bytes: int = 0
    batch_shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        shapes = [list(shape) for shape in sorted(self.batch_shapes)]
        return {"memory_bytes": self.memory_bytes, "batch_shapes": shapes}

    def add(self, memory_bytes: int, batch_shapes: Iterable[Sequence[int]] = ()) -> None:
        self.memory_bytes = max(self.memory_bytes, memory_bytes)
        self.batch_shapes |= set(map(tuple, batch_shapes))


class PackedProgram(Program):
    """What packs with the same union share: the step and the score, mapped over the cells.

    `loss(trainable, frozen, batch, key) -> (loss, sums)` and `scores(trainable, frozen, batch)` are
    of one cell, where `frozen` is what `Pack.bind` takes; `tx_of(cell)` makes one cell's optimizer,
    of one structure for all, since what differs is in its state (`tx` is any of them); `batch_axis`
    is 0 where each cell has batches of its own, None where all share them; `at_once` cells are
    computed side by side, chunk after chunk (0: all); `accumulate` is into how many parts a step
    cuts its batch; `placement` puts all of it on a mesh. `use` notes what is run.
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
        self.at_once, self.use = at_once, Use()
        self.num_parts = placement.num_parts if placement else 1
        self.mesh = mesh_text(placement.placement.mesh) if placement else ""
        self._place, self._stacked, self._tx_of = placement, batch_axis is not None, tx_of
        # Each with the bytes that it holds.
        self._compiled: dict[Any, tuple[Any, int]] = {}
        self._of_batch: dict[Any, Any] = {}
        self._compile_seconds = 0.0
        step = step_function(loss, tx, accumulate=accumulate)
        self._of_all = {
            "step": over_cells(step, at_once, batch_axis, num_parts=self.num_parts),
            "scores": over_cells(scores, at_once, None, num_parts=self.num_parts),
        }

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

    def step(self, state: TrainState, frozen: Any, batch: Any):
        """`(state, metrics)`, both with the axis K; `state` is donated."""
        arguments = self._placed("step", state, frozen, batch)
        compiled, num_bytes = self._get("step", *arguments)
        is_text = isinstance(batch, dict) and "input_ids" in batch
        self.use.add(num_bytes, [batch["input_ids"].shape] if is_text else ())
        return compiled(*arguments)

    def scores(self, trainable: Any, frozen: Any, batch: Any) -> Any:
        """Each cell's scores on a batch that all share, with the axis K."""
        arguments = self._placed("scores", trainable, frozen, batch)
        compiled, num_bytes = self._get("scores", *arguments)
        self.use.add(num_bytes)
        return compiled(*arguments)

    def evaluate(self, trainable: Any, frozen: Any, batches: Iterable[Any]) -> list[Evaluation]:
        """Each cell's scores on all batches."""
        return evaluate_stacked(self.scores, trainable, frozen, batches)

    def bytes_needed(self, state: Any, frozen: Any, batch: Any, evaluation: Any = None) -> int:
        """The bytes that a step or the scores of the batch `evaluation` hold, whichever is more.

        All arguments are arrays or shape structs. The best trainables are counted too, and for the
        scores the optimizer's state.
        """
        state, frozen, batch = self._placed("step", state, frozen, batch)
        needed = self._get("step", state, frozen, batch)[1]
        if evaluation is not None:
            arguments = self._placed("scores", state.trainable, frozen, evaluation)
            moments = num_bytes(state.opt_state, of_a_device=True)
            needed = max(needed, self._get("scores", *arguments)[1] + moments)
        return needed + num_bytes(state.trainable, of_a_device=True)

    def finite(self, trainable: Any) -> np.ndarray:
        return jax.device_get(_finite(trainable))

    def take_compile_seconds(self) -> float:
        taken, self._compile_seconds = self._compile_seconds, 0.0
        return taken

    def _get(self, name: str, first: Any, frozen: Any, batch: Any) -> tuple[Any, int]:
        leaves, treedef = jax.tree.flatten((first, batch))
        key = (name, treedef, *((np.shape(leaf), str(leaf.dtype)) for leaf in leaves))
        if key not in self._compiled:
            start = time.perf_counter()
            made = compile_ahead(self._jitted(name, first), first, frozen, batch)
            self._compiled[key] = made, memory_of(made)
            self._compile_seconds += time.perf_counter() - start
        return self._compiled[key]

    def _jitted(self, name: str, state: Any) -> Any:
        if name == "scores":
            return jax.jit(self._of_all[name])
        # On a mesh its state comes back to where the next step takes it.
        of_state = self._place and jax.tree.map(lambda x: x.sharding, state)
        out = of_state and (of_state, None)
        return jax.jit(self._of_all[name], donate_argnums=0, out_shardings=out)

    def _placed(self, name: str, first: Any, frozen: Any, batch: Any) -> tuple[Any, Any, Any]:
        """The arguments where the program has them: arrays of `take` and `keep` are there, and so
        is the base; shape structs get their sharding."""
        if self._place is None:
            return first, frozen, batch
        kind = "batch" if self._stacked and name == "step" else "shared batch"
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(first)):
            leaves, treedef = jax.tree.flatten(batch)
            key = (kind, treedef, *map(np.shape, leaves))
            if key not in self._of_batch:
                self._of_batch[key] = self._place.of(kind, batch)
            return first, frozen, place(batch, self._of_batch[key])
        of_first = self._place.of("state" if name == "step" else "trainable", first)
        data, base = frozen
        return (
            place(first, of_first),
            (place(as_shapes(data), self._place.of("data", data)), base),
            place(as_shapes(batch), self._place.of(kind, batch)),
        )

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
        kept = _keep
        if self._place is not None:
            kept = jax.jit(_keep, out_shardings=self._place.of("trainable", best))
        return kept(best, new, jnp.asarray(cells), jnp.asarray(better))


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
    def keep(old, x):
        chosen = better.reshape(-1, *[1] * (x.ndim - 1))
        return old.at[cells].set(jnp.where(chosen, x, old[cells]))

    return jax.tree.map(keep, best, new)
