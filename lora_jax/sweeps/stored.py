"""A pack on disk: trained from its configs to its cells' cards, however often it is interrupted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.data import Splits
from lora_jax.io.atomic import write_json
from lora_jax.io.untrusted import check_fields
from lora_jax.methods import Method
from lora_jax.models import Model
from lora_jax.settings import plain_config
from lora_jax.sweeps.groups import PackRecord
from lora_jax.sweeps.packed import PackTraining
from lora_jax.sweeps.prepared import Ready
from lora_jax.sweeps.program import Use
from lora_jax.train.build import plan_steps
from lora_jax.train.callbacks import StopAtSignal, restored, train_on_disk, validate_on
from lora_jax.train.cell import Schedule
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.environment import describe_program
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.loop import Callback, Diverged
from lora_jax.train.optimizer import make_schedule
from lora_jax.train.progress import ShowWith
from lora_jax.train.record import Card
from lora_jax.train.signals import stop_requests
from lora_jax.train.workdir import claim_cell, read_json_file
from lora_jax.train.write_results import write_results

FAILURE = "failure.json"


@dataclasses.dataclass(frozen=True)
class _Subject:
    model: Model
    method: Method
    splits: Splits


@partitionable()
def train_pack(
    ready: Ready,
    workdir: Path,
    *,
    memory_bytes: int,
    command: str,
    show_with: ShowWith,
    config_file: str = "",
    callbacks: Sequence[Callback] = (),
) -> dict[str, Card | RequestError]:
    """Trains the cells of a group as one pack; `{name: card, or its failure}`.

    A cell whose loss is no number leaves `failure.json` where others leave their card. Raises
    `Interrupted`, after saving, on SIGINT or SIGTERM; `RequestError` for what concerns them all.
    """
    started = time.perf_counter()
    cells, part, base = ready.group.cells, ready.group.plan, ready.base
    record = PackRecord(cells, memory_bytes)
    home = record.folder(workdir)
    folders = [workdir / "cells" / cell.name for cell in cells]
    for cell, folder in zip(cells, folders, strict=True):
        claim_cell(folder, plain_config(cell.config))
    record.write(workdir)
    config = cells[0].config
    steps = plan_steps(config.train, base.train_batches_of(config).steps_per_epoch)
    schedule = Schedule(**steps)
    splits, batches = base.eval_batches_of(config), ready.batches
    use = ready.program.use()
    validate = validate_on(ready.program, splits["validation"])

    def contents(training: PackTraining):
        facts = {
            "training": training.facts(),
            "schedules": batches.fingerprints,
            "program": use.to_json(),
        }
        return training.groups(), facts

    with stop_requests() as requested, Checkpoints(home / "checkpoints") as checkpoints:
        params = [ready.params_of(cell) for cell in part.cells]
        training = PackTraining(
            part, ready.program, params, ready.frozen, batches, validate, schedule
        )
        _resume(training, checkpoints, batches.fingerprints, use)
        tests = train_on_disk(
            training,
            checkpoints,
            folders,
            [make_schedule(cell.config.optimizer, schedule.num_steps) for cell in cells],
            base.task.unit,
            splits["test"],
            show_with(record.name, schedule.num_steps, start=training.step, enabled=True),
            contents=contents,
            more=[StopAtSignal(requested), *callbacks],
            started=started,
            again=command or "run the sweep again with the same workdir",
        )
        return _write_results(training, ready, folders, tests, home, use, config_file)


def _resume(
    training: PackTraining, checkpoints: Checkpoints, fingerprints: list[str], use: Use
) -> None:
    found = restored(checkpoints, lambda facts: training.like(facts["training"]))
    if found is None:
        return
    groups, facts, changes = found
    if facts["schedules"] != fingerprints:
        raise RequestError(
            f"{checkpoints.folder} is of other data or batches than the configs name now; put the "
            "old data back, or choose another workdir"
        )
    training.go_on_from(groups, facts["training"], changes)
    use.add(facts["program"])


def _write_results(
    training: PackTraining,
    ready: Ready,
    folders: Sequence[Path],
    tests: Mapping[int, Evaluation],
    home: Path,
    use: Use,
    config_file: str,
) -> dict[str, Card | RequestError]:
    cells = ready.group.cells
    union = training.plan.pack.union.table(ready.base.model.params)
    results: dict[str, Card | RequestError] = {}
    for k, (cell, folder) in enumerate(zip(cells, folders, strict=True)):
        if (folder / "card.json").exists():
            results[cell.name] = Card.read(folder / "card.json")
        elif k not in tests:
            results[cell.name] = write_failure(folder, training.cells[k].error, [folder, home])
        else:
            own = {
                "K": len(cells),
                "slot": k,
                "pack": home.name,
                "cells": [cell.name for cell in cells],
                "at_once": ready.program.at_once,
            }
            program = describe_program(
                union,
                sorted(use.batch_shapes),
                memory_bytes=use.memory_bytes,
                pack=own,
                mesh=training.cells[k].progress.mesh,
                numerics_changes=training.cells[k].progress.numerics_changes,
            )
            settings = training.cells[k].settings
            model = ready.base.model_of(settings.seed)
            results[cell.name] = write_results(
                folder,
                plain_config(cell.config),
                _Subject(model, settings.method, ready.base.splits),
                training.cells[k].progress,
                training.trainable_of(k),
                tests[k],
                program,
                config_file=config_file,
            )
    return results


def write_failure(folder: Path, why: str, homes: Sequence[Path]) -> Diverged:
    """Notes that the cell ended without a result, and why; returns it as an error.

    `homes` are the folders that would have to go before it could run again.
    """
    # Relative to the workdir, which may be moved.
    named = [f"{home.parent.name}/{home.name}" for home in homes]
    write_json(folder / FAILURE, {"error": why, "homes": named})
    return read_failure(folder)


def read_failure(folder: Path) -> Diverged | None:
    """How the cell failed for good, None if it did not."""
    path = folder / FAILURE
    if not path.exists():
        return None
    told = read_json_file(path)
    check_fields(told, {"error": str, "homes": list}, path, "remove the cell's folder")
    homes = " and ".join(str(folder.parent.parent / home) for home in told["homes"])
    return Diverged(f"{told['error']}; it will not run again before {homes} are removed")
