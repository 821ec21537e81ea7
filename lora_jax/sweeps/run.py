"""Running the cells of a sweep, one after another: finished cells are not run again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.sweeps.cells import Cell
from lora_jax.train import train_cell
from lora_jax.train.workdir import lock_workdir


def run_sweep(
    cells: Sequence[Cell],
    workdir: str | os.PathLike,
    *,
    progress: bool = True,
    command: str = "",
    on_cell: Callable[[int, Cell, dict[str, Any] | RequestError], None] | None = None,
) -> dict[str, dict[str, Any] | RequestError]:
    """Trains each cell into `workdir/cells/NAME`; returns `{name: card, or the cell's error}`.

    A cell that cannot be run is reported and the others still run. `on_cell(number, cell, result)`
    is called as each ends. Raises what concerns them all: a workdir in use, an interruption.
    """
    results: dict[str, dict[str, Any] | RequestError] = {}
    with lock_workdir(workdir):
        for number, cell in enumerate(cells):
            folder = Path(workdir) / "cells" / cell.name
            try:
                result = train_cell(cell.config, folder, progress=progress, command=command)
            except RequestError as error:
                result = error
            results[cell.name] = result
            if on_cell is not None:
                on_cell(number, cell, result)
    return results
