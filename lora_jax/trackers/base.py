"""The protocol of trackers, and importing their libraries."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from lora_jax._public import needs_extra


class Tracker(Protocol):
    """What a tracker does: start a run, log its steps, finish it.

    A training calls these on a shallow copy per cell, made before `start`: what `start` stores on
    `self` is the cell's own. An exception is reported once on stderr; the training goes on, without
    this tracker. A `title` tells several of one class apart ("wandb:my-project").

    >>> class Printer:
    ...     def start(self, name, group, settings, run_id):
    ...         self.name = name
    ...     def log(self, step, numbers):
    ...         print(self.name, step, numbers)
    ...     def finish(self, summary):
    ...         print(self.name, "ended")
    >>> printer: Tracker = Printer()
    """

    def start(self, name: str, group: str, settings: Mapping[str, Any], run_id: str) -> int | None:
        """Begins the run of a cell, or goes on with it.

        Args:
          name: the cell's name.
          group: the sweep's name; "" for a cell of no sweep.
          settings: flat, `{"method.rank": 8, …}`, with `config_hash`, `commit` and `workdir`.
          run_id: 16 hex digits that are the same whenever the cell is gone on with.

        Returns:
          The last step that the tracker's own store has of this run, None if it has none. Steps up
          to it are not logged again: a resumed training repeats those since its last checkpoint.
        """
        ...

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs the numbers of a step, `{"train/loss": 0.3, …}`: one call per step, steps rising.

        The last call of a finished cell has the numbers of its summary too.
        """
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the run.

        Args:
          summary: the metrics of the cell's card: `train/…`, `best/…` (validation, of the step
            whose weights were saved), `test/…`, `steps`, `stopped`, …; `{"error": why}` of a cell
            that failed; empty if the training was interrupted, and may go on later.
        """
        ...


def library(name: str, user: str) -> Any:
    """The module `name`. Raises `ModuleNotFoundError` that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if line := needs_extra(error):
            raise ModuleNotFoundError(
                f"lora_jax.trackers.{user}: {line}", name=error.name
            ) from None
        raise


def without_passwords(line: str) -> str:
    """A line whose addresses have no user and no password.

    >>> without_passwords("no answer from postgresql://me:secret@host/db")
    'no answer from postgresql://host/db'
    """
    return re.sub(r"://[^/@\s]*@", "://", line)


def numbers_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary.

    >>> numbers_of({"test/loss": 0.5, "steps": 12, "stopped": "budget of 12 steps ended"})
    {'test/loss': 0.5, 'steps': 12}
    """
    return {name: value for name, value in summary.items() if type(value) in (int, float)}


def texts_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """What else a summary has."""
    numbers = numbers_of(summary)
    return {name: str(value) for name, value in summary.items() if name not in numbers}
