"""A pack on disk: trained from its configs to its cells' cards, however often it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.io.untrusted import check_fields
from lora_jax.settings import plain_config
from lora_jax.sweeps.packed import PackTraining
from lora_jax.sweeps.record import PackRecord
from lora_jax.sweeps.runner import Ready
from lora_jax.train.build import Base, plan_steps
from lora_jax.train.callbacks import StopAtSignal, train_on_disk, validate_on
from lora_jax.train.environment import describe_program
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.loop import Callback, Diverged
from lora_jax.train.progress import ShowWith
from lora_jax.train.record import Card
from lora_jax.train.signals import stop_requests
from lora_jax.train.workdir import claim_cell, read_json_file
from lora_jax.train.write_results import write_results

FAILURE = "failure.json"


@partitionable()
def train_pack(
    ready: Ready,
    base: Base,
    workdir: Path,
    *,
    memory_bytes: int,
    command: str,
    show_with: ShowWith,
    config_file: str = "",
    callbacks: Sequence[Callback] = (),
) -> dict[str, Card | RequestError]:
    """Trains the cells of a pack on `base`; `{name: card, or its failure}`.

    A cell whose loss is not finite leaves `failure.json` where others leave their card. Raises
    `Interrupted`, after saving, on SIGINT or SIGTERM; `RequestError` for what concerns them all.
    """
    started = time.perf_counter()
    cells, program = ready.pack.cells, ready.program
    record = PackRecord(cells, memory_bytes)
    folders = [workdir / "cells" / cell.name for cell in cells]
    for cell, folder in zip(cells, folders, strict=True):
        claim_cell(folder, plain_config(cell.config))
    record.write(workdir)
    config = cells[0].config
    schedule = plan_steps(config.train, base.train_batches_of(config).steps_per_epoch)
    validation, test = base.eval_batches_of(config)
    with stop_requests() as requested:
        training = PackTraining(
            ready.pack, program, ready.params_of, ready.frozen, ready.batches,
            validate_on(program, validation), schedule,
        )  # fmt: skip
        tests = train_on_disk(
            training,
            record.folder(workdir),
            folders,
            test,
            show_with,
            unit=base.task.unit,
            more=[StopAtSignal(requested), *callbacks],
            started=started,
            again=command or "run the sweep again with the same workdir",
        )
        return _write_results(training, program.at_once, base, folders, tests, record, config_file)


def _write_results(
    training: PackTraining,
    at_once: int,
    base: Base,
    folders: Sequence[Path],
    tests: Mapping[int, Evaluation],
    record: PackRecord,
    config_file: str,
) -> dict[str, Card | RequestError]:
    cells, use = training.pack.cells, training.use
    table = training.pack.union.table(base.model.params)
    of_pack = {
        "K": len(cells), "pack": record.name, "cells": [cell.name for cell in cells],
        "at_once": at_once,
    }  # fmt: skip
    results: dict[str, Card | RequestError] = {}
    for k, (cell, folder) in enumerate(zip(cells, folders, strict=True)):
        progress = training.cells[k].progress
        if (folder / "card.json").exists():
            results[cell.name] = Card.read(folder / "card.json")
        elif k not in tests:
            home = record.folder(folder.parent.parent)
            results[cell.name] = write_failure(folder, training.cells[k].error, [folder, home])
        else:
            program = describe_program(
                table, sorted(use.batch_shapes), memory_bytes=use.memory_bytes, progress=progress,
                pack={**of_pack, "slot": k},
            )  # fmt: skip
            results[cell.name] = write_results(
                folder, plain_config(cell.config), base.model_of(cell.seed), cell.method,
                base.splits, progress, training.trainable_of(k), tests[k], program,
                config_file=config_file,
            )  # fmt: skip
    return results


def write_failure(folder: Path, why: str, homes: Sequence[Path]) -> Diverged:
    """Notes that the cell ended without a result, and why; returns it as an error.

    `homes` are the folders that would have to go before it could run again.
    """
    # Relative to the workdir, which may be moved.
    named = [f"{home.parent.name}/{home.name}" for home in homes]
    write_json(folder / FAILURE, {"error": why, "homes": named})
    return _as_error(folder, why, named)


def read_failure(folder: Path) -> Diverged | None:
    """How the cell failed for good, None if it did not."""
    path = folder / FAILURE
    if not path.exists():
        return None
    values = read_json_file(path)
    check_fields(values, {"error": str, "homes": list}, path, "remove the cell's folder")
    return _as_error(folder, values["error"], values["homes"])


def _as_error(folder: Path, why: str, homes: Sequence[str]) -> Diverged:
    named = " and ".join(str(folder.parent.parent / home) for home in homes)
    return Diverged(f"{why}; it will not run again before {named} are removed")
