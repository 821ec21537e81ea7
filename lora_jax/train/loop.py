"""Training a cell from its config to its card, however often it is interrupted on the way."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from jax.sharding import Mesh

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.formats.paths import at_home
from lora_jax.parallel.mesh import mesh_text
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.build import Base, Setup, build
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.compilation import enable_compilation_cache
from lora_jax.train.configs import complete
from lora_jax.train.environment import describe_program
from lora_jax.train.finish import write_results
from lora_jax.train.memory import StepMemory, device_limit_bytes
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.numerics import check_resumed
from lora_jax.train.progress import ShowWith, show_progress
from lora_jax.train.record import Card
from lora_jax.train.run import Run, StopRequested, copy_arrays
from lora_jax.train.signals import Interrupted, stop_requests
from lora_jax.train.state import TrainState
from lora_jax.train.workdir import (
    check_cell,
    check_inside,
    claim_cell,
    is_folder_name,
    lock_workdir,
    plain_config,
)


def train(
    config: Any,
    workdir: str | os.PathLike,
    name: str = "run",
    *,
    progress: bool = True,
    command: str = "",
    config_file: str = "",
    mesh: Mesh | None = None,
) -> Card:
    """Trains what `config` says into `workdir/cells/name` and returns the run's card.

    The card's attributes are those of card.json: `card.metrics.test.loss`. (Indexing it as the dict
    that it was, `card["metrics"]["test"]["loss"]`, is deprecated and goes in the next release.)
    Settings that `config` omits have their defaults (`train/configs.py`).
    A run that was stopped, in whatever way, goes on from its last checkpoint and ends with the same
    weights, bit for bit, as one that was not; a finished one is not run again. `command` is what to
    tell the user to type after Ctrl-C; `config_file` ("FILE.py[:arg]") is noted in the card.
    `mesh` has the devices to train on (`parallel.make_mesh`);
    without it, one. A run may go on on another mesh, and rounds in another way from there. Raises
    `RequestError` for what the user can set right, in which case nothing is begun, and
    `Interrupted`, after saving, on SIGINT or SIGTERM.
    """
    if not is_folder_name(name):
        raise RequestError(f"name {name!r} is not the name of a folder; use letters, digits and -")
    config = complete(config)
    workdir = at_home(workdir)
    with lock_workdir(workdir):
        cell = workdir / "cells" / name
        return train_cell(
            config, cell, progress=progress, command=command, config_file=config_file, mesh=mesh
        )


@partitionable()
def train_cell(
    config: Any,
    cell: str | os.PathLike,
    *,
    progress: bool = True,
    command: str = "",
    config_file: str = "",
    base: Base | None = None,
    mesh: Mesh | None = None,
    show_with: ShowWith = show_progress,
) -> Card:
    """`train` for the folder `cell` of a workdir whose lock the caller holds.

    `base` saves loading model and data again; `show_with` shows the way in place of a bar.
    """
    cell, plain = at_home(cell), plain_config(config)
    check_inside(cell)
    check_cell(cell, plain)
    if (cell / "card.json").exists():
        return Card.read(cell / "card.json")
    started = time.perf_counter()
    enable_compilation_cache()
    # All that a request can have wrong shows itself here, before anything is written.
    setup, state = build(config, base, mesh)
    if progress and base is None:
        for note in setup.splits.notes:
            print(f"{cell.name}: {note}", file=sys.stderr)
    if setup.note:
        print(f"{cell.name}: {setup.note}", file=sys.stderr)
    memory = _check_memory(setup, state)
    if progress and base is None:
        of_each = "" if setup.placement is None else " on each device"
        print(f"{cell.name}: a step takes {memory}{of_each}", file=sys.stderr)
    claim_cell(cell, plain)
    with stop_requests() as stop_requested, Checkpoints(cell / "checkpoints") as checkpoints:
        books, state, best = _resume(checkpoints, setup, state)
        books = books.on_mesh("" if setup.placement is None else mesh_text(setup.placement.mesh))
        with (
            MetricsWriter(cell, num_lines=books.metrics_lines, step=books.step) as metrics,
            show_with(
                cell.name,
                setup.num_steps,
                start=books.step,
                enabled=progress,
                unit=setup.task.unit,
            ) as show,
        ):
            run = Run(setup, books, state, best, checkpoints, metrics, show, stop_requested)
            run.seconds["setup"] = run.seconds.get("setup", 0.0) + time.perf_counter() - started
            try:
                run.until_stopped()
                test = run.test()
            except StopRequested:
                checkpoints.wait()
                again = command or "call train() again with the same config and workdir"
                raise Interrupted(
                    f"stopped by {stop_requested()} at step {run.books.step} of {setup.num_steps}; "
                    f"all is saved in {cell}. To go on: {again}"
                ) from None
        # On the disk before the results say that the run is over.
        checkpoints.wait()
        program = describe_program(
            setup.method.table(setup.model.params),
            setup.step.shapes,
            memory_bytes=max(setup.step.memory_bytes, setup.scores.memory_bytes),
            mesh=run.books.mesh,
            numerics_changes=run.books.numerics_changes,
        )
        return write_results(
            cell, plain, setup, run.books, run.best, test, program, config_file=config_file
        )


def _check_memory(setup: Setup, state: TrainState) -> StepMemory:
    """What a step of the widest batch takes. Raises `RequestError` where that does not fit."""
    compiled = setup.step.compiled(state, setup.frozen, setup.batches.widest(setup.num_steps))
    num_devices = 1 if setup.placement is None else setup.placement.mesh.size
    limit = device_limit_bytes(num_devices)
    memory = StepMemory.of(compiled, base=setup.frozen, state=state, limit=limit)
    memory.check()
    return memory


def _resume(
    checkpoints: Checkpoints, setup: Setup, state: TrainState
) -> tuple[Bookkeeping, TrainState, Any]:
    """Books, state and best trainable of the latest checkpoint, or those of a beginning."""
    changes: tuple[str, ...] = ()

    def like(facts: dict[str, Any]) -> dict[str, Any]:
        # Before the arrays are compared: x64 changes their dtypes, and is the cause to name.
        nonlocal changes
        changes = check_resumed(facts.get("numerics", {}), checkpoints.folder)
        return {"state": state, "best": state.trainable}

    restored = checkpoints.restore(like)
    if restored is None:
        return Bookkeeping(), state, None
    groups, facts = restored
    books = Bookkeeping.from_json(facts["bookkeeping"]).with_changes(changes)
    setup.batches.set_state(facts["data"])
    state = groups["state"]
    if books.best_step == 0:
        best = None
    else:
        best = groups["best"] if "best" in groups else copy_arrays(state.trainable)
    return books, state, best
