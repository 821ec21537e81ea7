"""How far a sweep is, from its workdir's files alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.sweeps.record import SWEEP, read_record
from lora_jax.train.metrics import read_metrics
from lora_jax.train.record import Card
from lora_jax.train.workdir import is_locked, read_json_file

STATES = ("done", "running", "stopped", "failed", "waiting")


@dataclasses.dataclass(frozen=True)
class CellStatus:
    """One cell. `state` is one of STATES; a "stopped" one was begun and nobody is at work.

    `step` of `num_steps` (None where it was not planned yet), `loss`: the last training loss that
    was logged; `seconds` spent so far, a packed cell's share; `note`: why it ended or failed.
    """

    name: str
    state: str
    step: int
    num_steps: int | None
    loss: float | None
    seconds: float
    note: str


def sweep_status(workdir: str | os.PathLike) -> list[CellStatus]:
    """The cells of `workdir`, in the order of the sweep.

    Raises `RequestError` if it holds no sweep.
    """
    workdir = at_home(workdir)
    if not (workdir / SWEEP).exists():
        raise RequestError(f"{workdir} holds no sweep (no sweep.json); give a sweep's --workdir")
    try:
        return _statuses(workdir)
    except RequestError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RequestError(
            f"a file of the sweep in {workdir} is malformed ({type(error).__name__}: {error}); "
            "restore sweep.json and metrics.jsonl, or remove the cell's folder"
        ) from error


def _statuses(workdir: Path) -> list[CellStatus]:
    record = read_record(workdir)
    folders = sorted(path.name for path in (workdir / "cells").glob("[!.]*"))
    names = dict.fromkeys([*record["cells"], *folders])
    at_work = is_locked(workdir)
    return [_status(workdir / "cells" / name, record, at_work) for name in names]


def seconds_left(cells: list[CellStatus]) -> float | None:
    """What the cells that are under way still need, at their pace so far; None if unknown."""
    left = [
        c.seconds / c.step * (c.num_steps - c.step)
        for c in cells
        if c.state == "running" and c.num_steps and c.step and c.seconds
    ]
    return sum(left) if left else None


def _status(folder: Path, record: dict[str, Any], at_work: bool) -> CellStatus:
    rows = read_metrics(folder / "metrics.jsonl")
    trained = [row for row in rows if row["split"] == "train"]
    begun = (folder / "config.json").exists()
    state, note = ("running" if at_work else "stopped") if begun else "waiting", ""
    step = max((row["step"] for row in rows), default=0)
    if (folder / "card.json").exists():
        metrics = Card.read(folder / "card.json").metrics
        state, step = "done", metrics.steps
        note = f"test loss {metrics.test.loss:.4f}, {metrics.stopped}"
    elif (folder / "failure.json").exists():
        state, note = "failed", read_json_file(folder / "failure.json")["error"]
    elif not begun and (refused := record["refused"].get(folder.name)):
        state, note = "failed", refused
    seconds = max((row.get("seconds") or 0.0 for row in rows), default=0.0)
    loss = float(trained[-1]["loss"]) if trained else None
    num_steps = record["num_steps"].get(folder.name)
    return CellStatus(folder.name, state, step, num_steps, loss, seconds, note)
