"""Training a cell from its config to its card, however often it is interrupted on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.parallel.mesh import mesh_text
from lora_jax.settings import complete, plain_config
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.build import Base, Setup, build
from lora_jax.train.callbacks import StopAtSignal, restored, train_on_disk, validate_on
from lora_jax.train.cell import Schedule
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.compilation import enable_compilation_cache
from lora_jax.train.environment import describe_program
from lora_jax.train.loop import Callback, Diverged, Training
from lora_jax.train.memory import StepMemory, device_limit_bytes
from lora_jax.train.program import SingleProgram, copy_arrays
from lora_jax.train.progress import ShowWith, show_progress
from lora_jax.train.record import Card
from lora_jax.train.signals import stop_requests
from lora_jax.train.state import TrainState
from lora_jax.train.workdir import (
    check_cell,
    check_inside,
    claim_cell,
    is_folder_name,
    lock_workdir,
)
from lora_jax.train.write_results import write_results


def train(
    config: Any,
    workdir: str | os.PathLike,
    name: str = "run",
    *,
    progress: bool = True,
    command: str = "",
    config_file: str = "",
    mesh: Mesh | None = None,
    callbacks: Sequence[Callback] = (),
) -> Card:
    """Trains what `config` says into `workdir/cells/name` and returns the run's card.

    The card's attributes are those of card.json: `card.metrics.test.loss`. (Indexing it as the dict
    that it was, `card["metrics"]["test"]["loss"]`, is deprecated and goes in the next release.)
    Settings that `config` omits have their defaults (`lora_jax/settings`).
    A run that was stopped, in whatever way, goes on from its last checkpoint and ends with the same
    weights, bit for bit, as one that was not; a finished one is not run again. `command` is what to
    tell the user to type after Ctrl-C; `config_file` ("FILE.py[:arg]") is noted in the card.
    `mesh` has the devices to train on (`parallel.make_mesh`);
    without it, one. A run may go on on another mesh, and rounds in another way from there.
    `callbacks` (`train.Callback`) are notified of what the run does, and may stop it. Raises
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
            config, cell, progress=progress, command=command, config_file=config_file, mesh=mesh,
            callbacks=callbacks,
        )  # fmt: skip


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
    callbacks: Sequence[Callback] = (),
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
    with stop_requests() as requested, Checkpoints(cell / "checkpoints") as checkpoints:
        training = _training(_Settings(cell.name, config.optimizer.lr), setup, state)
        _resume(training, checkpoints, setup)
        show = show_with(
            cell.name,
            setup.num_steps,
            start=training.step,
            enabled=progress,
            unit=setup.task.unit,
        )
        (test,) = train_on_disk(
            training,
            checkpoints,
            [cell],
            [setup.schedule],
            setup.task.unit,
            setup.test,
            show,
            contents=functools.partial(_contents, setup),
            more=[StopAtSignal(requested), _RaiseDiverged(setup, checkpoints), *callbacks],
            started=started,
            again=command or "call train() again with the same config and workdir",
        ).values()
        done = training.cells[0].progress
        program = describe_program(
            setup.method.table(setup.model.params),
            setup.step.shapes,
            memory_bytes=max(setup.step.memory_bytes, setup.scores.memory_bytes),
            mesh=done.mesh,
            numerics_changes=done.numerics_changes,
        )
        return write_results(
            cell, plain, setup, done, training.best, test, program, config_file=config_file
        )


@dataclasses.dataclass(frozen=True)
class _Settings:
    name: str
    lr: float


def _training(settings: _Settings, setup: Setup, state: TrainState) -> Training:
    """One cell in one lane."""

    mesh = "" if setup.placement is None else mesh_text(setup.placement.mesh)
    program = SingleProgram(setup.step, setup.scores, mesh)
    return Training(
        [settings],
        program,
        state,
        lambda cells: setup.frozen,
        _InOrder(setup.batches),
        validate_on(program, setup.validation),
        Schedule(
            num_steps=setup.num_steps,
            eval_every=setup.eval_every,
            patience=setup.patience,
            log_every=setup.log_every,
            checkpoint_every=setup.checkpoint_every,
        ),
    )


class _InOrder:
    """Batches of an iterator, whose position is a checkpoint's."""

    def __init__(self, batches: Iterator[Any]):
        self._batches = batches

    def at(self, step: int, cells: Sequence[Any]) -> Any:
        return next(self._batches)


class _RaiseDiverged(Callback):
    """Ends the run where its one cell failed, before anything more is saved."""

    def __init__(self, setup: Setup, checkpoints: Checkpoints):
        self._setup, self._checkpoints = setup, checkpoints

    def failed(self, training, k, what, step):
        with contextlib.suppress(RequestError):
            self._checkpoints.wait()
        good = self._checkpoints.latest_step
        kept = (
            "no checkpoint was written yet"
            if good is None
            else f"the checkpoint of step {good} is kept"
        )
        lr = float(self._setup.schedule(max(0, step - 1)))
        raise Diverged(
            f"{what} at step {step} (learning rate {lr:g}); {kept}. Lower optimizer.lr or "
            "optimizer.clip_norm and train in another workdir"
        )


def _check_memory(setup: Setup, state: TrainState) -> StepMemory:
    """What a step of the widest batch takes. Raises `RequestError` where that does not fit."""
    compiled = setup.step.compiled(state, setup.frozen, setup.batches.widest(setup.num_steps))
    num_devices = 1 if setup.placement is None else setup.placement.mesh.size
    limit = device_limit_bytes(num_devices)
    memory = StepMemory.of(compiled, base=setup.frozen, state=state, limit=limit)
    memory.check()
    return memory


def _contents(setup: Setup, training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and facts of a checkpoint."""
    # The next loss would be the first to tell, and this checkpoint would be the last one then.
    training.check_weights()
    progress = training.cells[0].progress
    groups = {"state": training.state}
    if progress.best_step not in (0, training.step):
        groups["best"] = training.best
    return groups, {"bookkeeping": progress.to_json(), "data": setup.batches.get_state()}


def _resume(training: Training, checkpoints: Checkpoints, setup: Setup) -> None:
    """Goes on from the latest checkpoint, if there is one."""
    state = training.state
    found = restored(checkpoints, lambda facts: {"state": state, "best": state.trainable})
    if found is None:
        return
    groups, facts, changes = found
    progress = Bookkeeping.from_json(facts["bookkeeping"]).with_changes(changes)
    setup.batches.set_state(facts["data"])
    best = groups.get("best")
    if best is None and progress.best_step:
        best = copy_arrays(groups["state"].trainable)
    training.cells[0].progress = progress
    training.restore(progress.step, progress.evaluated_step, [0], groups["state"], best)
