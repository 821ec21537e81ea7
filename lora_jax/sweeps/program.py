"""The compiled step and score of a pack: one program for each width and batch shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.build import keys_of
from lora_jax.train.state import TrainState
from lora_jax.train.step import step_function


class Program:
    """What packs with the same union share: the step and the score, mapped over the cells.

    `loss(params, batch)` is a lifted scalar function; `tx_of(cell)` makes one cell's optimizer, of
    one structure for all, since what differs is in its state; `batch_axis` is 0 where each cell has
    batches of its own, None where all share them.
    """

    def __init__(
        self,
        pack: Pack,
        loss: Callable[[Any, Any], jax.Array],
        tx_of: Callable[[CellSettings], Any],
        tx: Any,
        *,
        batch_axis: int | None,
    ):
        self._tx_of = tx_of
        self._compiled: dict[Any, Any] = {}
        self._compile_seconds = 0.0

        def loss_of(trainable, frozen, batch, key=None):
            data, base = frozen
            return loss(pack.bind(trainable, data, base, key=key), batch), {}

        def score_of(trainable, frozen, batch):
            return loss_of(trainable, frozen, batch)[0]

        # The cells' own data have their axis, the base has none: one copy of it serves all.
        frozen_axes = (0, None)
        step = jax.vmap(step_function(loss_of, tx), in_axes=(0, frozen_axes, batch_axis))
        score = jax.vmap(score_of, in_axes=(0, frozen_axes, None))
        self._functions = {"step": jax.jit(step, donate_argnums=0), "score": jax.jit(score)}

    def init(self, pack: Pack, cells: Sequence[CellSettings], params: Any) -> TrainState:
        """The cells' states before the first step, leaves with a leading axis K."""
        keys = [keys_of(cell.seed) for cell in cells]
        trainable = pack.init([key[1] for key in keys], params)
        opt_states = [
            self._tx_of(cell).init(jax.tree.map(lambda leaf, k=k: leaf[k], trainable))
            for k, cell in enumerate(cells)
        ]
        return TrainState(
            step=jnp.zeros(len(cells), jnp.int32),
            trainable=trainable,
            opt_state=jax.tree.map(lambda *leaves: jnp.stack(leaves), *opt_states),
            key=jnp.stack([key[2] for key in keys]),
        )

    def step(self, state: TrainState, frozen: Any, batch: Any):
        """`(state, metrics)`, both with the axis K; `state` is donated."""
        return self._get("step", state, frozen, batch)(state, frozen, batch)

    def score(self, trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        """Each cell's loss (K,) on a batch that all share, without dropout."""
        return self._get("score", trainable, frozen, batch)(trainable, frozen, batch)

    def bytes_needed(self, state: Any, frozen: Any, batch: Any) -> int:
        """What a step holds at once, and the copy of the best trainable beside; arrays or structs.

        Arguments, temporaries, and results that do not take an argument's place.
        """
        memory = self._get("step", state, frozen, batch).memory_analysis()
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        best = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.trainable))
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept + best

    def take_compile_seconds(self) -> float:
        """Seconds spent compiling since this was asked last."""
        taken, self._compile_seconds = self._compile_seconds, 0.0
        return taken

    def _get(self, name: str, first: Any, frozen: Any, batch: Any):
        leaves, treedef = jax.tree.flatten((first, batch))
        key = (name, treedef, *((np.shape(leaf), str(leaf.dtype)) for leaf in leaves))
        if key not in self._compiled:
            start = time.perf_counter()
            lowered = self._functions[name].lower(first, frozen, batch)
            self._compiled[key] = lowered.compile()
            self._compile_seconds += time.perf_counter() - start
        return self._compiled[key]
