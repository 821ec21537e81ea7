"""Where a pack's batches come from: one sequence for all cells, or each cell's own order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.settings import CellSettings


class SharedBatches:
    """A sequence that all cells go through in order, over and over."""

    axis = None

    def __init__(self, batches: Sequence[Any]):
        if isinstance(batches, dict) or not batches:
            raise RequestError(
                f"batches is {'one dict' if batches else 'empty'}; give a sequence of batches, or "
                "a function of a seed"
            )
        self._batches = batches

    def widest(self, cells: Sequence[CellSettings]) -> Any:
        """The largest batch."""
        return _as_arrays(max(self._batches, key=num_elements))

    def at(self, step: int, cells: Sequence[CellSettings]) -> Any:
        """The batch of the step that comes after `step` others."""
        return _as_arrays(self._batches[step % len(self._batches)])


class OwnBatches:
    """Each cell's own order, `source(seed)`, opened once; batches have a leading axis of cells."""

    axis = 0

    def __init__(self, source: Callable[[int], Iterable[Any]]):
        self._source = source
        self._open: dict[str, Any] = {}

    def widest(self, cells: Sequence[CellSettings]) -> Any:
        """The shapes of the first batch of `cells`, taken from the first one's order."""
        stream = self._stream(cells[0])
        first = next(stream, None)
        if first is None:
            raise RequestError("batches(seed) gave no batch; a sweep needs one for each step")
        self._open[cells[0].name] = itertools.chain([first], stream)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(cells), *leaf.shape), leaf.dtype),
            _as_arrays(first),
        )

    def at(self, step: int, cells: Sequence[CellSettings]) -> Any:
        """The next batches of these cells, stacked. Raises `RequestError` where one has ended."""
        each = []
        for cell in cells:
            batch = next(self._stream(cell), None)
            if batch is None:
                raise RequestError(
                    f"batches({cell.seed}) gave {step} batches; a sweep needs one for each step"
                )
            each.append(_as_arrays(batch))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def _stream(self, cell: CellSettings):
        if cell.name not in self._open:
            self._open[cell.name] = iter(self._source(cell.seed))
        return self._open[cell.name]


def _as_arrays(batch: Any) -> Any:
    return jax.tree.map(jnp.asarray, batch)


def num_elements(batch: Any) -> int:
    """How many numbers a batch holds."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(batch))
