"""The one engine of sweeps: fits packs to the memory, narrows them, trains them, takes errors.

`lj.sweep` extends it for cells in memory (`in_memory.py`), `lora-jax sweep` for those of a workdir
(`workdir.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.program import PackedProgram, with_lanes
from lora_jax.train.cell import Cell
from lora_jax.train.memory import device_limit_bytes


class DoesNotFit(RequestError):
    """One cell alone needs more than the budget."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A pack with what trains it, at any width.

    `params_of(cell)` is the tree that a cell begins with, `frozen` what no step changes.
    `batches.at(step, cells)` gives a step's, `batches.widest(cells)` the largest; `evaluation()`
    the largest batch of an evaluation, None without one.
    """

    pack: Pack
    program: PackedProgram
    params_of: Callable[[Cell], Any]
    frozen: Any
    batches: Any
    evaluation: Callable[[], Any]


@dataclasses.dataclass(kw_only=True)
class Runner:
    """Runs cells; every result goes into `results`, and the first of a cell stays.

    A result is what `train` gives, or the `RequestError` that kept the cell from having one.
    """

    memory_bytes: int
    results: dict[str, Any] = dataclasses.field(default_factory=dict)

    def packs(self, cells: Sequence[Cell]) -> Iterator[tuple[list[Pack], Mapping[str, Any]]]:
        """Packs of the cells that are still to be trained, and `{name: why}` of refused ones."""
        raise NotImplementedError

    def ready(self, pack: Pack) -> Ready | None:
        """What trains the pack; None if it is one cell that trains alone."""
        raise NotImplementedError

    def is_begun(self, pack: Pack) -> bool:
        """Whether a part of its training is saved: it stays as it is then, whatever the budget."""
        return False

    def divide(self, pack: Pack, parts: Sequence[Sequence[int]]) -> list[Pack]:
        """The pack's parts, by the numbers of their cells."""
        return [pack.take(part) for part in parts]

    def train(self, pack: Pack, ready: Any, needed: int) -> Mapping[str, Any]:
        """`{name: result}` of training the pack; `ready` is what `ready` gave, `needed` the bytes
        that its program holds."""
        raise NotImplementedError

    def failure(self, error: Exception) -> RequestError | None:
        """The result of cells that `error` kept from running; None if it is to be raised."""
        raise NotImplementedError

    def ended(self, name: str, result: Any) -> None:
        """A cell has its result."""

    def between(self) -> None:
        """Called between trainings; may raise to stop the sweep."""

    def say(self, line: str) -> None:
        """Tells the user."""

    def run(self, cells: Sequence[Cell]) -> None:
        """Trains what is not finished. A pack that cannot run leaves the others to run."""
        for packs, refused in self.packs(cells):
            self.take(refused)
            for pack in packs:
                self.between()
                self._run_pack(pack)

    def take(self, results: Mapping[str, Any]) -> None:
        """Takes the results of cells that have none yet."""
        for name, result in results.items():
            if name not in self.results:
                self.results[name] = result
                self.ended(name, result)

    def _run_pack(self, pack: Pack) -> None:
        try:
            for part, ready, needed in self._fitted(pack):
                self.take(self.train(part, ready, needed))
                self.between()
        except Exception as error:
            why = self.failure(error)
            if why is None:
                raise
            self.take({cell.name: why for cell in pack.cells})

    def _fitted(self, pack: Pack) -> Iterator[tuple[Pack, Ready | None, int]]:
        """The pack's parts that fit into the budget, with what trains them and what it needs."""
        ready = self.ready(pack)
        if ready is None or self.is_begun(pack):
            yield pack, ready, 0
            return
        width, needed = fitting_width(ready, self.memory_bytes)
        count = math.ceil(len(pack.cells) / width)
        if count == 1:
            yield pack, ready, needed
            return
        self.say(
            f"{count} packs of up to {width} cells instead: what fits into "
            f"{self.memory_bytes / 2**20:,.0f} MiB"
        )
        numbers = np.array_split(np.arange(len(pack.cells)), count)
        for part in self.divide(pack, [some.tolist() for some in numbers]):
            yield part, self.ready(part), needed


def fitting_width(ready: Ready, budget: int) -> tuple[int, int]:
    """The widest pack of the first cells that the budget holds, and its bytes.

    Only shapes are used: nothing is allocated. Raises `DoesNotFit` if the budget does not hold one
    cell.
    """
    program, width = ready.program, len(ready.pack.cells)
    while True:
        part = ready.pack.take(range(width))
        params = [ready.params_of(cell) for cell in part.cells]
        state = jax.eval_shape(lambda part=part, params=params: program.init(part, params))
        batch, data = ready.batches.widest(part.cells), part.data()
        if (lanes := program.padded(width)) != width:
            state, data = (with_lanes(tree, lanes) for tree in (state, data))
            batch = ready.batches.widest([part.cells[min(k, width - 1)] for k in range(lanes)])
        needed = program.bytes_needed(state, (data, ready.frozen), batch, ready.evaluation())
        if needed <= budget:
            return width, needed
        parts = program.num_parts
        if lanes == parts:  # one on each
            raise DoesNotFit(
                f"one cell alone needs {needed / 2**20:,.1f} MiB of {budget / 2**20:,.1f} MiB; use "
                "smaller batches or raise the memory budget"
            )
        width = parts * math.ceil(lanes // parts / 2)


def device_memory_bytes(num_devices: int = 1) -> int:
    """What a program may use: nine tenths of the device's memory, on CPU half of the host's, which
    so many devices share."""
    share = 0.5 if jax.default_backend() == "cpu" else 0.9
    return int(share * device_limit_bytes(num_devices))
