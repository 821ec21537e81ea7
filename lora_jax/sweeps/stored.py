"""A pack on disk: trained from its configs to its cells' cards, however often it is interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.data import Splits
from lora_jax.formats.atomic import write_json
from lora_jax.formats.untrusted import check_fields
from lora_jax.methods import Method
from lora_jax.models import Model
from lora_jax.sweeps.cells import Cell
from lora_jax.sweeps.engine import PackTraining
from lora_jax.sweeps.groups import PackRecord
from lora_jax.sweeps.keeping import Keeper, PackedCell, Schedule
from lora_jax.sweeps.program import Use
from lora_jax.sweeps.ready import Ready
from lora_jax.train.build import plan_steps
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.environment import describe_program
from lora_jax.train.evaluate import Evaluation, evaluate_stacked
from lora_jax.train.finish import write_results
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.numerics import check_resumed, numerics
from lora_jax.train.optimizer import make_schedule
from lora_jax.train.progress import Show, ShowWith
from lora_jax.train.record import Card
from lora_jax.train.run import Diverged, StopRequested
from lora_jax.train.signals import Interrupted, stop_requests
from lora_jax.train.workdir import claim_cell, plain_config, read_json_file

FAILURE = "failure.json"


@dataclasses.dataclass(frozen=True)
class _Subject:
    model: Model
    method: Method
    splits: Splits


class DiskKeeper(Keeper):
    """Metrics of each cell, and checkpoints of the pack."""

    def __init__(
        self,
        cells: Sequence[Cell],
        under_way: Sequence[PackedCell],
        writers: Sequence[MetricsWriter],
        checkpoints: Checkpoints,
        fingerprints: list[str],
        num_steps: int,
        stop_requested: Callable[[], str],
        show: Show,
        use: Use,
        unit: str,
    ):
        self._writers, self._checkpoints = writers, checkpoints
        self._fingerprints, self._use, self._unit = fingerprints, use, unit
        self._rates = [make_schedule(cell.config.optimizer, num_steps) for cell in cells]
        self._weights = [0.0] * len(cells)
        # Seconds of training and weight at the last log; a resumed pack counts from here on.
        self._since = [(cell.books.seconds.get("train", 0.0), 0.0) for cell in under_way]
        self.stop_requested = stop_requested
        self._show = show

    def stepped(self, k, rows):
        self._weights[k] += sum(row[3] for row in rows)

    def logged(self, training, k, values):
        seconds, step = training.cells[k].books.seconds, training.step
        now = (seconds.get("train", 0.0), self._weights[k])
        before, self._since[k] = self._since[k], now
        elapsed = now[0] - before[0]
        self._writers[k].write(
            step=step,
            split="train",
            **values,
            lr=float(self._rates[k](training.cells[k].books.step - 1)),
            **{f"{self._unit}_per_s": (now[1] - before[1]) / elapsed if elapsed > 0 else None},
            seconds=sum(seconds.values()),
        )

    def validated(self, training, k, loss, accuracy):
        self._writers[k].write(
            step=training.step,
            split="validation",
            loss=loss,
            accuracy=accuracy,
            seconds=sum(training.cells[k].books.seconds.values()),
        )

    def save(self, training):
        for writer, cell in zip(self._writers, training.cells, strict=True):
            writer.sync()
            cell.books = dataclasses.replace(cell.books, metrics_lines=writer.num_lines)
        facts = {
            "training": training.facts(),
            "schedules": self._fingerprints,
            "program": self._use.to_json(),
            "numerics": numerics(),
        }
        if self._checkpoints.latest_step != training.step:
            self._checkpoints.save(training.step, training.groups(), facts)

    def show(self, training):
        self._show(training.step, training.mean_loss(), None)


@partitionable()
def train_pack(
    ready: Ready,
    workdir: Path,
    *,
    memory_bytes: int,
    command: str,
    show_with: ShowWith,
    config_file: str = "",
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
    schedule = Schedule(
        num_steps=steps["num_steps"],
        eval_every=steps["eval_every"],
        patience=steps["patience"],
        log_every=steps["log_every"],
        checkpoint_every=steps["checkpoint_every"],
    )
    looks, batches = base.eval_batches_of(config), ready.batches
    use = ready.program.use()
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(stop_requests())
        checkpoints = stack.enter_context(Checkpoints(home / "checkpoints"))

        def until_signal(split) -> Iterator[Any]:
            for batch in split:
                if stop_requested():
                    raise StopRequested
                training_shown()
                yield batch

        def validate(trainable, frozen):
            split = until_signal(looks["validation"])
            found = evaluate_stacked(ready.program.scores, trainable, frozen, split)
            return [(one.loss, one.accuracy) for one in found]

        params = [ready.params_of(cell) for cell in part.cells]
        state = ready.program.init(part.pack, part.cells, params)
        training = PackTraining(
            part, ready.program, state, ready.frozen, batches, validate, schedule, Keeper()
        )
        _resume(training, checkpoints, batches.fingerprints, use)
        writers = [
            stack.enter_context(
                MetricsWriter(folder, num_lines=cell.books.metrics_lines, step=training.step)
            )
            for folder, cell in zip(folders, training.cells, strict=True)
        ]
        show = stack.enter_context(
            show_with(record.name, schedule.num_steps, start=training.step, enabled=True)
        )
        keeper = DiskKeeper(
            cells,
            training.cells,
            writers,
            checkpoints,
            batches.fingerprints,
            schedule.num_steps,
            stop_requested,
            show,
            use,
            base.task.unit,
        )
        training_shown = functools.partial(keeper.show, training)  # evaluating takes its time too
        training.begin(keeper, started)
        try:
            training.run()
            tests = _test(training, ready, until_signal(looks["test"]))
        except StopRequested:
            checkpoints.wait()
            again = command or "run the sweep again with the same workdir"
            raise Interrupted(
                f"stopped by {stop_requested()} at step {training.step} of {schedule.num_steps} of "
                f"{record.name}; all is saved in {home}. To go on: {again}"
            ) from None
        for k, test in tests.items():
            writers[k].write(
                step=training.cells[k].books.best_step,
                split="test",
                loss=test.loss,
                accuracy=test.accuracy,
            )
        # On the disk before the results say that the pack is over.
        checkpoints.wait()
        return _write_results(training, ready, folders, tests, home, use, config_file)


def _resume(
    training: PackTraining, checkpoints: Checkpoints, fingerprints: list[str], use: Use
) -> None:
    changes: tuple[str, ...] = ()

    def like(facts: dict[str, Any]) -> dict[str, Any]:
        # Before the arrays are compared: x64 changes their dtypes, and is the cause to name.
        nonlocal changes
        changes = check_resumed(facts.get("numerics", {}), checkpoints.folder)
        return training.like(facts["training"])

    restored = checkpoints.restore(like)
    if restored is None:
        return
    groups, facts = restored
    if facts["schedules"] != fingerprints:
        raise RequestError(
            f"{checkpoints.folder} is of other data or batches than the configs name now; put the "
            "old data back, or choose another workdir"
        )
    training.restore(groups, facts["training"])
    for cell in training.cells:
        cell.books = cell.books.with_changes(changes)
    use.add(facts["program"])


def _test(training: PackTraining, ready: Ready, batches) -> dict[int, Evaluation]:
    """The test scores of each cell that did not fail, with its best trainable."""
    good = [k for k, cell in enumerate(training.cells) if not cell.error]
    if not good:
        return {}
    found = evaluate_stacked(ready.program.scores, *training.best_of_all(), batches)
    training.lap("evaluate", [training.cells[k] for k in good])
    return {k: found[k] for k in good}


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
                mesh=training.cells[k].books.mesh,
                numerics_changes=training.cells[k].books.numerics_changes,
            )
            settings = training.cells[k].settings
            model = ready.base.model_of(settings.seed)
            results[cell.name] = write_results(
                folder,
                plain_config(cell.config),
                _Subject(model, settings.method, ready.base.splits),
                training.cells[k].books,
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
