"""The one engine of sweeps: fits groups of cells to the memory, narrows them, trains, takes errors.

`lj.sweep` gives it a spec of dicts, `lora-jax sweep` one of a file and a workdir.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.sweeps.memory import fitting_width


class Spec:
    """Which cells share a program, what trains them, where results go.

    A group has `cells`, each with a `name`. What `ready` gives has `plan`, `program`, `frozen`,
    `batches`, `params_of(cell)` and `evaluation`, the largest batch of one or None.
    """

    def groups(self, cells: Sequence[Any]) -> Iterator[tuple[list[Any], Mapping[str, Any]]]:
        """Groups of the cells that are still to be trained, and `{name: why}` of refused ones."""
        raise NotImplementedError

    def ready(self, group: Any) -> Any:
        """What trains the group as a pack; None if it trains alone, as wide as it is."""
        raise NotImplementedError

    def is_begun(self, group: Any) -> bool:
        """Whether a part of its training is saved: it stays as it is then, whatever the budget."""
        return False

    def divide(self, group: Any, parts: Sequence[Sequence[int]]) -> list[Any]:
        """The group's parts, by the numbers of their cells."""
        raise NotImplementedError

    def train(self, group: Any, ready: Any, needed: int) -> Mapping[str, Any]:
        """`{name: result}` of training the group; `needed` bytes are what its program holds."""
        raise NotImplementedError

    def failure(self, error: Exception) -> Any:
        """The result of cells that `error` kept from running; None if it is to be raised."""
        return None

    def ended(self, name: str, result: Any) -> None:
        """A cell has its result."""

    def between(self, results: Mapping[str, Any]) -> None:
        """Called between trainings; may raise to stop the sweep."""


class Runner:
    """Runs cells; every result goes into `results`, and the first of a cell stays."""

    def __init__(self, spec: Spec, memory_bytes: int, say: Callable[[str], None]):
        self.results: dict[str, Any] = {}
        self._spec, self._memory_bytes, self._say = spec, memory_bytes, say

    def run(self, cells: Sequence[Any]) -> None:
        """Trains what is not finished. A group that cannot run leaves the others to run."""
        for groups, refused in self._spec.groups(cells):
            self.take(refused)
            for group in groups:
                self._spec.between(self.results)
                self._run_group(group)

    def take(self, results: Mapping[str, Any]) -> None:
        """Takes the results of cells that have none yet."""
        for name, result in results.items():
            if name not in self.results:
                self.results[name] = result
                self._spec.ended(name, result)

    def _run_group(self, group: Any) -> None:
        try:
            for part, ready, needed in self._fitted(group):
                self.take(self._spec.train(part, ready, needed))
                self._spec.between(self.results)
        except Exception as error:
            why = self._spec.failure(error)
            if why is None:
                raise
            self.take({cell.name: why for cell in group.cells})

    def _fitted(self, group: Any) -> Iterator[tuple[Any, Any, int]]:
        """The group's parts that fit into the budget, with what trains them and what it needs."""
        ready = self._spec.ready(group)
        if ready is None or self._spec.is_begun(group):
            yield group, ready, 0
            return
        width, needed = fitting_width(
            ready.program,
            ready.plan,
            ready.params_of,
            ready.frozen,
            ready.batches,
            self._memory_bytes,
            ready.evaluation,
        )
        count = math.ceil(len(group.cells) / width)
        if count == 1:
            yield group, ready, needed
            return
        self._say(
            f"{count} packs of up to {width} cells instead: what fits into "
            f"{self._memory_bytes / 2**20:,.0f} MiB"
        )
        numbers = np.array_split(np.arange(len(group.cells)), count)
        for part in self._spec.divide(group, [some.tolist() for some in numbers]):
            yield part, self._spec.ready(part), needed
