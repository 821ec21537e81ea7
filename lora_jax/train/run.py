"""Training a cell from its config to its card, however often it is interrupted on the way."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.parallel.mesh import mesh_text
from lora_jax.settings import Settings, complete, plain_config
from lora_jax.trackers.base import Tracker
from lora_jax.train.build import Base, Setup, build
from lora_jax.train.callbacks import Options, train_on_disk, validate_on
from lora_jax.train.cell import Cell, Progress
from lora_jax.train.compilation import enable_compilation_cache
from lora_jax.train.environment import describe_program
from lora_jax.train.loop import Callback, Training
from lora_jax.train.memory import StepMemory, device_limit_bytes
from lora_jax.train.program import Program, copy_arrays
from lora_jax.train.record import Card
from lora_jax.train.signals import stop_requests
from lora_jax.train.state import TrainState
from lora_jax.train.tracking import make_links, summary_of, track_finished, track_on_disk
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
    trackers: Sequence[Tracker] = (),
) -> Card:
    """Trains what `config` says into `workdir/cells/name` and returns the run's card.

    A run that was stopped, in whatever way, goes on from its last checkpoint and ends with the same
    weights, bit for bit, as one that was not; a finished one is not run again.

    Args:
      config: a `ConfigDict`, nested dicts or `Settings`; settings that it omits have their defaults
        (`lora_jax/settings/README.md`).
      workdir: the folder for runs; made if need be.
      name: the run's folder in `workdir/cells`.
      progress: show a bar, or a line now and then, on stderr.
      command: what to tell the user to type after Ctrl-C.
      config_file: "FILE.py[:arg]", noted in the card.
      mesh: the devices to train on (`parallel.make_mesh`); None for one. A run may go on on another
        mesh, and rounds in another way from there.
      callbacks: are notified of what the run does (`train.Callback`), and may stop it.
      trackers: where its metrics go besides metrics.jsonl and TensorBoard's files
        (`lora_jax.trackers`); what one lacks of a finished run is sent, too.

    Returns:
      The `Card`, whose attributes are those of card.json: `card.metrics.test.loss`. (Indexing it as
      the dict that it was, `card["metrics"]["test"]["loss"]`, is deprecated and goes in the next
      release.)

    Raises:
      RequestError: what the user can set right; nothing is begun then.
      Interrupted: after saving, on SIGINT, SIGTERM or when a callback asks to stop.

    >>> card = train(make_config({"model.name": "tiny-bert", …}), "runs")  # doctest: +SKIP
    >>> card.metrics.test.accuracy  # doctest: +SKIP
    """
    if not is_folder_name(name):
        raise RequestError(f"name {name!r} is not the name of a folder; use letters, digits and -")
    config, workdir = complete(config), at_home(workdir)
    options = Options(
        command=command or "call train() again with the same config and workdir",
        config_file=config_file, callbacks=callbacks, links=make_links(trackers),
        progress=progress,
    )  # fmt: skip
    with lock_workdir(workdir):
        return train_cell(config, workdir / "cells" / name, options, mesh=mesh)


@partitionable()
def train_cell(
    config: Settings,
    cell: str | os.PathLike,
    options: Options,
    *,
    base: Base | None = None,
    mesh: Mesh | None = None,
) -> Card:
    """`train` for the folder `cell` of a workdir whose lock the caller holds.

    `base` saves loading model and data again.
    """
    cell, plain = at_home(cell), plain_config(config)
    check_inside(cell)
    check_cell(cell, plain)
    if (cell / "card.json").exists():
        card = Card.read(cell / "card.json")
        track_finished(cell, card, options.links, options.group)
        return card
    started = time.perf_counter()
    enable_compilation_cache()
    # All that a request can have wrong shows itself here, before anything is written.
    setup, state = build(config, base, mesh)
    notes = [setup.note] if setup.note else []
    memory = _check_memory(setup, state)
    if options.progress and base is None:
        of_each = "" if setup.placement is None else " on each device"
        notes = [*setup.splits.notes, *notes, f"a step takes {memory}{of_each}"]
    for note in notes:
        print(f"{cell.name}: {note}", file=sys.stderr)
    claim_cell(cell, plain)
    unit = setup.task.unit
    with (
        stop_requests(),
        track_on_disk([cell], [plain], options.links, options.group, unit) as tracking,
    ):
        training = SingleTraining(Cell(cell.name, config), setup, state)
        tests = train_on_disk(
            training, cell, [cell], setup.test, options, tracking, unit=unit, started=started
        )
        done = training.cells[0].progress
        table = setup.method.table(setup.model.params)
        program = describe_program(table, training.use(), done)
        return write_results(
            cell, plain, setup.model, setup.method, setup.splits, done, training.best, tests[0],
            program, options.config_file, lambda card: tracking.finish(0, summary_of(card)),
        )  # fmt: skip


class SingleTraining(Training):
    """One cell in one lane, not mapped."""

    def __init__(self, cell: Cell, setup: Setup, state: TrainState):
        mesh = "" if setup.placement is None else mesh_text(setup.placement.mesh)
        program = Program(setup.step, setup.scores, mesh)
        self._data, self.use = setup.batches, program.use
        validate = validate_on(program, setup.validation)
        super().__init__(
            [cell], program, state, lambda cells: setup.frozen, self, validate, setup.schedule
        )

    def at(self, step: int, cells: Sequence[Cell]) -> Any:
        """The next batch: the iterator's position is the checkpoint's."""
        return next(self._data)

    def contents(self):
        # The next loss would be the first to tell, and this checkpoint would be the last one then.
        self.check_weights()
        progress = self.cells[0].progress
        groups = {"state": self.state}
        if progress.best_step not in (0, self.step):
            groups["best"] = self.best
        return groups, {"bookkeeping": progress.to_json(), "data": self._data.get_state()}

    def like(self, facts):
        return {"state": self.state, "best": self.state.trainable}

    def go_on_from(self, groups, facts, changes):
        progress = Progress.from_json(facts["bookkeeping"], changes)
        self._data.set_state(facts["data"])
        best = groups.get("best")
        if best is None and progress.best_step:
            best = copy_arrays(groups["state"].trainable)
        self.cells[0].progress = progress
        self.restore(progress.step, progress.evaluated_step, [0], groups["state"], best)


def _check_memory(setup: Setup, state: TrainState) -> StepMemory:
    """What a step of the widest batch takes. Raises `RequestError` where that does not fit."""
    widest = setup.batches.widest(setup.schedule.num_steps)
    compiled = setup.step.compiled(state, setup.frozen, widest)
    num_devices = 1 if setup.placement is None else setup.placement.mesh.size
    limit = device_limit_bytes(num_devices)
    memory = StepMemory.of(compiled, base=setup.frozen, state=state, limit=limit)
    memory.check()
    return memory
