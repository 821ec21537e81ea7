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
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.build import keys_of
from lora_jax.train.compilation import compile_ahead, memory_of
from lora_jax.train.evaluate import Evaluation, evaluate_stacked
from lora_jax.train.loss import LossFunction
from lora_jax.train.memory import num_bytes
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
    _seen: set[int] = dataclasses.field(default_factory=set)

    def note(self, compiled: Any, batch: Any = None) -> None:
        if isinstance(batch, dict) and "input_ids" in batch:
            self.batch_shapes.add(tuple(batch["input_ids"].shape))
        if id(compiled) not in self._seen:
            self._seen.add(id(compiled))
            self.memory_bytes = max(self.memory_bytes, memory_of(compiled))

    def to_json(self) -> dict[str, Any]:
        shapes = [list(shape) for shape in sorted(self.batch_shapes)]
        return {"memory_bytes": self.memory_bytes, "batch_shapes": shapes}

    def add(self, told: dict[str, Any]) -> None:
        """Takes in what another record said."""
        self.memory_bytes = max(self.memory_bytes, told["memory_bytes"])
        self.batch_shapes |= {tuple(shape) for shape in told["batch_shapes"]}


class PackedProgram:
    """What packs with the same union share: the step and the score, mapped over the cells.

    `loss(trainable, frozen, batch, key) -> (loss, sums)` and `scores(trainable, frozen, batch)` are
    of one cell, where `frozen` is what `Pack.bind` takes; `tx_of(cell)` makes one cell's optimizer,
    of one structure for all, since what differs is in its state; `batch_axis` is 0 where each cell
    has batches of its own, None where all share them; `at_once` cells are computed side by side,
    chunk after chunk (0: all); `accumulate` is into how many parts a step cuts its batch; `place`
    puts all of it on a mesh.
    """

    def __init__(
        self,
        loss: LossFunction,
        scores: Callable[[Any, Any, Any], Any],
        tx_of: Callable[[CellSettings], Any],
        tx: Any,
        *,
        batch_axis: int | None,
        at_once: int,
        accumulate: int = 1,
        place: CellPlacement | None = None,
    ):
        self.at_once = at_once
        self._place, self._stacked = place, batch_axis is not None
        self._tx_of = tx_of
        self._compiled: dict[Any, Any] = {}
        self._of_batch: dict[Any, Any] = {}
        self._compile_seconds = 0.0
        self._use = Use()
        step = step_function(loss, tx, accumulate=accumulate)
        self._step = over_cells(step, at_once, batch_axis, num_parts=self.num_parts)
        self._scores = over_cells(scores, at_once, None, num_parts=self.num_parts)

    @property
    def mesh(self) -> str:
        """As `--mesh` has it, "" for one device."""
        return "" if self._place is None else mesh_text(self._place.placement.mesh)

    @property
    def num_parts(self) -> int:
        """The parts of a mesh that have cells of their own."""
        return self._place.num_parts if self._place else 1

    def padded(self, count: int) -> int:
        """The lanes that `count` cells need: their number must be a multiple of `num_parts`."""
        return count + -count % self.num_parts

    def init(self, pack: Pack, cells: Sequence[CellSettings], params: Sequence[Any]) -> TrainState:
        """The cells' states before the first step, leaves with a leading axis K.

        `params` has a tree for each cell, which differ at most in what is trained whole.
        """
        keys = [keys_of(cell.seed) for cell in cells]
        each = pack.init([key[1] for key in keys], params)
        opt_states = [self._tx_of(cell).init(own) for cell, own in zip(cells, each, strict=True)]
        trainable, opt_state = _stack(*zip(each, opt_states, strict=True))
        return TrainState(
            step=jnp.zeros(len(cells), jnp.int32),
            trainable=trainable,
            opt_state=opt_state,
            key=jnp.stack([key[2] for key in keys]),
        )

    def step(self, state: TrainState, frozen: Any, batch: Any):
        """`(state, metrics)`, both with the axis K; `state` is donated."""
        arguments = self._placed("step", state, frozen, batch)
        compiled = self._get("step", *arguments)
        self._use.note(compiled, batch)
        return compiled(*arguments)

    def scores(self, trainable: Any, frozen: Any, batch: Any) -> Any:
        """Each cell's scores on a batch that all share, with the axis K."""
        arguments = self._placed("scores", trainable, frozen, batch)
        compiled = self._get("scores", *arguments)
        self._use.note(compiled)
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
        best = num_bytes(state.trainable, of_a_device=True)
        needed = memory_of(self._get("step", state, frozen, batch)) + best
        if evaluation is not None:
            arguments = self._placed("scores", state.trainable, frozen, evaluation)
            scores = memory_of(self._get("scores", *arguments))
            needed = max(needed, scores + best + num_bytes(state.opt_state, of_a_device=True))
        return needed

    def use(self) -> Use:
        """From here on, what is called is noted in a new record."""
        self._use = Use()
        return self._use

    def finite(self, trainable: Any) -> np.ndarray:
        """(lanes,) bool: whether all weights of a lane are finite."""
        return jax.device_get(_finite(trainable))

    def take_compile_seconds(self) -> float:
        """Seconds spent compiling since the last call."""
        taken, self._compile_seconds = self._compile_seconds, 0.0
        return taken

    def _get(self, name: str, first: Any, frozen: Any, batch: Any):
        leaves, treedef = jax.tree.flatten((first, batch))
        key = (name, treedef, *((np.shape(leaf), str(leaf.dtype)) for leaf in leaves))
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = compile_ahead(self._jitted(name, first), first, frozen, batch)
            self._compile_seconds += time.perf_counter() - start
        return self._compiled[key]

    def _jitted(self, name: str, state: Any) -> Any:
        if name == "scores":
            return jax.jit(self._scores)
        if self._place is None:
            return jax.jit(self._step, donate_argnums=0)
        # Its state comes back to where the next step takes it.
        of_state = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(self._step, donate_argnums=0, out_shardings=(of_state, None))

    def _placed(self, name: str, first: Any, frozen: Any, batch: Any) -> tuple[Any, Any, Any]:
        """The arguments where the program has them: arrays of `take` and `keep` are there, and so
        is the base; shape structs get their sharding."""
        if self._place is None:
            return first, frozen, batch
        stacked = self._stacked and name == "step"
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(first)):
            leaves, treedef = jax.tree.flatten(batch)
            key = (stacked, treedef, *map(np.shape, leaves))
            if key not in self._of_batch:
                self._of_batch[key] = self._place.of_batch(batch, stacked=stacked)
            return first, frozen, place(batch, self._of_batch[key])
        of_first = self._place.of_state if name == "step" else self._place.of_trainable
        data, base = frozen
        return (
            place(first, of_first(first)),
            (place(as_shapes(data), self._place.of_data(data)), base),
            place(as_shapes(batch), self._place.of_batch(batch, stacked=stacked)),
        )

    def take(self, kind: str, tree: Any, lanes: Sequence[int]) -> Any:
        """These lanes of a tree with an axis of them, lying as the programs have it.

        `kind` is "state", "trainable" or "data".
        """
        leaves = jax.tree.leaves(tree)
        if not leaves:  # cells that differ in nothing have no data of their own
            return tree
        as_it_is = list(lanes) == list(range(leaves[0].shape[0]))
        if self._place is None:
            return tree if as_it_is else _take(tree, lanes)
        taking = functools.partial(_take, lanes=lanes)
        where = getattr(self._place, f"of_{kind}")(jax.eval_shape(taking, tree))
        if as_it_is:
            return jax.device_put(tree, where)
        return jax.jit(taking, out_shardings=where)(tree)

    def keep(
        self, best: Any, new: Any, cells: Sequence[int], better: np.ndarray, count: int
    ) -> Any:
        """The trainables `best` with the lanes of `new` that are better in the places of `cells`.

        `best` has `count` places; without any it is zero in them. Cells beyond are dropped.
        """
        if best is None:
            best = self.take("trainable", _zeros(new, count), range(count))
        where = None if self._place is None else self._place.of_trainable(best)
        kept = _keep if where is None else jax.jit(_keep, out_shardings=where)
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
