"""A pack on disk: trained from its configs to its cells' cards, however often it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from lora_jax.train.callbacks import Options, train_on_disk, validate_on
from lora_jax.train.environment import describe_program
from lora_jax.train.loop import Diverged
from lora_jax.train.record import Card
from lora_jax.train.signals import stop_requests
from lora_jax.train.tracking import summary_of, track_on_disk
from lora_jax.train.workdir import claim_cell, read_json_file
from lora_jax.train.write_results import write_results

FAILURE = "failure.json"


@partitionable()
def train_pack(
    ready: Ready,
    base: Base,
    workdir: Path,
    options: Options,
    *,
    memory_bytes: int,
) -> dict[str, Card | RequestError]:
    """Trains the cells of a pack on `base`; `{name: card, or its failure}`.

    A cell whose loss is not finite leaves `failure.json` where others leave their card. Raises
    `Interrupted`, after saving, on SIGINT or SIGTERM; `RequestError` for what concerns them all.
    """
    started = time.perf_counter()
    cells, program = ready.pack.cells, ready.program
    record = PackRecord(cells, memory_bytes)
    home = record.folder(workdir)
    folders = [workdir / "cells" / cell.name for cell in cells]
    plain = [plain_config(cell.config) for cell in cells]
    for own, folder in zip(plain, folders, strict=True):
        claim_cell(folder, own)
    record.write(workdir)
    config = cells[0].config
    schedule = plan_steps(config.train, base.train_batches_of(config).steps_per_epoch)
    validation, test = base.eval_batches_of(config)
    unit = base.task.unit
    with (
        stop_requests(),
        track_on_disk(folders, plain, options.links, options.group, unit) as tracking,
    ):
        training = PackTraining(ready, validate_on(program, validation), schedule)
        tests = train_on_disk(
            training, home, folders, test, options, tracking, unit=unit, started=started
        )
        of_pack = {
            "K": len(cells), "pack": home.name, "cells": [cell.name for cell in cells],
            "at_once": program.at_once,
        }  # fmt: skip
        table = ready.pack.union.table(base.model.params)

        def result_of(k: int) -> Card | RequestError:
            cell, folder, ended = cells[k], folders[k], training.cells[k]
            if (folder / "card.json").exists():
                return Card.read(folder / "card.json")
            if k not in tests:
                return write_failure(folder, ended.error, [folder, home])
            compiled = describe_program(
                table, program.use(), ended.progress, {**of_pack, "slot": k}
            )  # fmt: skip
            return write_results(
                folder, plain[k], base.model_of(cell.seed), cell.method, base.splits,
                ended.progress, training.trainable_of(k), tests[k], compiled, options.config_file,
                lambda card: tracking.finish(k, summary_of(card)),
            )  # fmt: skip

        return {cell.name: result_of(k) for k, cell in enumerate(cells)}


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
