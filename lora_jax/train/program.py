"""The compiled programs that the training loop drives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.train.compilation import CompiledByShape, Use
from lora_jax.train.evaluate import Evaluation, evaluate_stacked
from lora_jax.train.state import TrainState


class Program:
    """A step and scores of lanes; here one lane, not mapped: that of a run alone.

    Trees of packs (`sweeps.program`) have a leading axis of lanes. `mesh` is as `--mesh` has it, ""
    for one device.
    """

    def __init__(self, step: CompiledByShape, scores: CompiledByShape, mesh: str = ""):
        self._step, self._scores, self.mesh = step, scores, mesh
        self._counted = 0.0

    def step(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        """`(state, metrics)`, the metrics with a value for each lane; `state` is donated."""
        return self._step(state, frozen, batch)

    def scores(self, trainable: Any, frozen: Any, batch: Any) -> Any:
        """Each lane's scores on a batch that all share."""
        return self._scores(trainable, frozen, batch)

    def evaluate(self, trainable: Any, frozen: Any, batches: Iterable[Any]) -> list[Evaluation]:
        """The scores of each lane on all batches."""
        return evaluate_stacked(self._scores, trainable, frozen, batches)

    def padded(self, count: int) -> int:
        """The number of lanes that `count` cells need."""
        return count

    def take(self, kind: str, tree: Any, lanes: Sequence[int]) -> Any:
        """These lanes of a tree; `kind` is "state", "trainable" or "data"."""
        return tree

    def keep(
        self, best: Any, new: Any, cells: Sequence[int], better: np.ndarray, count: int
    ) -> Any:
        """`best`, a tree over `count` cells or None, with the lanes of `new` that are `better`.

        `cells` names the cell in each lane; those from `count` on are dropped.
        """
        return copy_arrays(new) if better[0] else best

    def finite(self, trainable: Any) -> np.ndarray:
        """(lanes,) bool: whether all weights of a lane are finite."""
        return np.atleast_1d(jax.device_get(_all_finite(trainable)))

    def take_compile_seconds(self) -> float:
        """Seconds spent compiling since the last call."""
        before, self._counted = self._counted, self._step.seconds + self._scores.seconds
        return self._counted - before

    def use(self) -> Use:
        """What was run since `begin_use`: the memory of all, the batch shapes of steps."""
        memory_bytes = max(self._step.use.memory_bytes, self._scores.use.memory_bytes)
        return Use(memory_bytes, self._step.use.batch_shapes)

    def begin_use(self, **earlier: Any) -> None:
        """Begins a new record of what is run, with an `earlier` one's `to_json` in it."""
        self._step.use, self._scores.use = Use(), Use()
        self._step.use.add(**earlier)


def copy_arrays(tree: Any) -> Any:
    """Arrays of their own: the next step takes the state's buffers back."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
