"""Runs the cells of a workdir: what is finished is passed over, what was begun is gone on with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from lora_jax.core.errors import RequestError
from lora_jax.formats.atomic import write_json
from lora_jax.sweeps.cells import Cell
from lora_jax.sweeps.groups import OWN, Group, PackRecord, base_key, make_groups, read_packs
from lora_jax.sweeps.memory import fitting_width
from lora_jax.sweeps.program import default_at_once
from lora_jax.sweeps.ready import Ready, make_ready
from lora_jax.sweeps.record import SWEEP, read_record
from lora_jax.sweeps.stored import read_failure, train_pack, write_failure
from lora_jax.sweeps.view import SweepView
from lora_jax.train import train_cell
from lora_jax.train.build import Base, load_base
from lora_jax.train.record import Card
from lora_jax.train.run import Diverged
from lora_jax.train.signals import Interrupted, stop_requests
from lora_jax.train.workdir import flat_config, plain_config

Result = Card | RequestError


@dataclasses.dataclass
class Runner:
    """Runs cells of one workdir; every result goes into `results`."""

    workdir: Path
    view: SweepView
    memory_bytes: int
    command: str
    progress: bool
    mesh: Mesh | None = None
    config_file: str = ""
    at_once: int = dataclasses.field(default_factory=default_at_once)
    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    bases: dict[str, Base] = dataclasses.field(default_factory=dict)
    ready: list[Ready] = dataclasses.field(default_factory=list)

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs what is not finished, and puts every result in `results`."""
        if not cells:
            return
        self.view.expect(len(cells))
        waiting = self.take_finished(cells)
        if self.results and len(waiting) < len(cells):
            self.view.say(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished already")
        for same in by_base(waiting):
            try:
                base = self._base_of(same[0])
                groups, refused = self.groups_of(same, base)
            except RequestError as error:
                self._take({cell.name: error for cell in same})
                continue
            self._take(refused)
            note_steps(self.workdir, groups)
            for number, group in enumerate(groups, 1):
                self.view.expect(0, len(group.cells) * group.num_steps)
                self.view.say(f"program {number} of {len(groups)}: {group}")
            for group in groups:
                self._stop_if_asked()
                self._run_group(group, base)
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Between trainings; a training that is under way saves and stops by itself."""
        with stop_requests() as requested:
            if requested():
                done = sum(not isinstance(r, RequestError) for r in self.results.values())
                again = self.command or "run the sweep again with the same workdir"
                raise Interrupted(
                    f"stopped by {requested()} with {done} cells done; all is saved in "
                    f"{self.workdir}. To go on: {again}"
                )

    def take_finished(self, cells: Sequence[Cell]) -> list[Cell]:
        """Puts what is finished, or failed for good, into `results`; returns the rest."""
        waiting = []
        for cell in cells:
            folder = self.workdir / "cells" / cell.name
            if (folder / "card.json").exists():
                self.results[cell.name] = Card.read(folder / "card.json")
            elif (failure := read_failure(folder)) is not None:
                self.results[cell.name] = failure
            else:
                waiting.append(cell)
                continue
            self.view.ended(failed=isinstance(self.results[cell.name], RequestError))
        return waiting

    def groups_of(self, cells: Sequence[Cell], base: Base):
        """Packs that were begun as they were begun, cells begun alone alone, the rest anew.

        A pack counts as begun once it has a checkpoint, and before that while the memory budget is
        the same: then it was divided off from others that may have ended.
        """
        waiting = {cell.name: cell for cell in cells}
        groups: list[Group] = []
        refused: dict[str, RequestError] = {}

        def plan(some: Sequence[Cell]) -> None:
            made, impossible = make_groups(some, base)
            groups.extend(made)
            refused.update(impossible)

        for record in read_packs(self.workdir):
            if self._is_begun(record, waiting):
                before = len(groups)
                plan([waiting.pop(cell.name, None) or cell for cell in record.cells])
                if len(groups) != before + 1 or len(groups[-1].cells) != len(record.cells):
                    raise RequestError(
                        f"{record.folder(self.workdir)} was begun by a version that let its cells "
                        "share a program, which they do not here; use that version, or remove it "
                        "and the folders of its cells"
                    )
        for name in list(waiting):
            if (self.workdir / "cells" / name / "checkpoints").exists():
                plan([waiting.pop(name)])
        plan(list(waiting.values()))
        return groups, refused

    def _is_begun(self, record: PackRecord, waiting: Mapping[str, Cell]) -> bool:
        """Whether cells of this pack wait, and it is to be gone on with."""
        mine = [cell for cell in record.cells if cell.name in waiting]
        same = [cell for cell in mine if waiting[cell.name].hash == cell.hash]
        saved = record.has_checkpoint(self.workdir)
        if same and len(same) < len(mine):
            if saved:
                others = [cell.name for cell in mine if cell not in same]
                self.view.say(
                    f"{record.name} was begun with other settings of {', '.join(others)}: its "
                    "unfinished cells begin again"
                )
            return False
        return bool(same) and (saved or record.memory_bytes == self.memory_bytes)

    def _base_of(self, cell: Cell) -> Base:
        key = base_key(cell)
        if key not in self.bases:
            self.bases.clear()  # one model in memory at a time
            self.ready.clear()
            self.bases[key] = load_base(cell.config, self.mesh)
            for note in self.bases[key].splits.notes:
                self.view.say(note)
        return self.bases[key]

    def _run_group(self, group: Group, base: Base) -> None:
        try:
            if not group.is_pack:
                (cell,) = group.cells
                with self.view.running(1, group.num_steps):
                    self._take({cell.name: self._run_alone(cell, base)})
                return
            if group.cells[0].config.optimizer.get("offload"):
                self.view.say("optimizer.offload is for cells alone; a pack's moments are small")
            for part, ready in self._fitted(group, base):
                if not part.is_pack:
                    self._run_group(part, base)
                    continue
                with self.view.running(len(part.cells), part.num_steps):
                    self._take(
                        train_pack(
                            ready,
                            self.workdir,
                            memory_bytes=self.memory_bytes,
                            command=self.command,
                            config_file=self.config_file,
                            show_with=self.view.show_with,
                        )
                    )
                self._stop_if_asked()
        except (RequestError, jax.errors.JaxRuntimeError) as error:
            why = _reason(error)
            if why is None:
                raise
            self._take({c.name: why for c in group.cells if c.name not in self.results})

    def _run_alone(self, cell: Cell, base: Base) -> Result:
        folder = self.workdir / "cells" / cell.name
        try:
            return train_cell(
                cell.config,
                folder,
                progress=self.progress,
                command=self.command,
                config_file=self.config_file,
                base=base,
                show_with=self.view.show_with,
            )
        except Diverged as error:
            return write_failure(folder, str(error), [folder])

    def _fitted(self, group: Group, base: Base) -> Iterator[tuple[Group, Ready]]:
        """The group's parts that fit into the budget, with what trains them.

        A pack that was begun stays as it is, whatever the budget.
        """
        ready = self._ready(group, base)
        record = PackRecord(group.cells, self.memory_bytes)
        if record.has_checkpoint(self.workdir):
            yield group, ready
            return
        width, _ = fitting_width(
            ready.program,
            group.plan,
            ready.params_of,
            ready.frozen,
            ready.batches,
            self.memory_bytes,
            ready.batches.widest_look(),
        )
        if width == len(group.cells):
            yield group, ready
            return
        count = math.ceil(len(group.cells) / width)
        self.view.say(
            f"{count} packs of up to {width} cells instead: what fits into "
            f"{self.memory_bytes / 2**20:,.0f} MiB"
        )
        some = [group.cells[n * width : (n + 1) * width] for n in range(count)]
        parts = [make_groups(cells, base)[0][0] for cells in some]
        for part in parts:
            # All now: killed after the first, the rest must not be divided anew.
            if part.is_pack:
                PackRecord(part.cells, self.memory_bytes).write(self.workdir)
        for part in parts:
            yield part, self._ready(part, base)

    def _ready(self, group: Group, base: Base) -> Ready:
        """With the program of an earlier pack where it is the same."""
        made = make_ready(group, base, at_once=self.at_once)
        for other in self.ready:
            if _same_program(other.group, group):
                return dataclasses.replace(made, program=other.program)
        self.ready.append(made)
        return made

    def _take(self, results: Mapping[str, Result]) -> None:
        for name, result in results.items():
            if name in self.results:  # a card of before, of a cell that its pack needed again
                continue
            self.results[name] = result
            failed = isinstance(result, RequestError)
            self.view.ended(failed=failed)
            self.view.say(f"{name}: {f'failed: {result}' if failed else _one_line(result)}")


def _reason(error: Exception) -> RequestError | None:
    """What to tell of cells that this kept from running; None for what is a defect of ours."""
    if isinstance(error, RequestError):
        return error
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return RequestError(
            f"the device ran out of memory ({text.splitlines()[0][:200]}); run the same command "
            "with a smaller --memory-gib, or smaller batches"
        )
    return None


def _same_program(one: Group, other: Group) -> bool:
    """Whether two packs of one base compile to one program at equal widths."""

    def rest(group: Group):
        flat = flat_config(plain_config(group.cells[0].config))
        return {key: value for key, value in flat.items() if key not in OWN}

    return (
        one.plan.pack.union == other.plan.pack.union
        and one.num_steps == other.num_steps
        and rest(one) == rest(other)
    )


def _one_line(card: Card) -> str:
    metrics = card.metrics
    return (
        f"test loss {metrics.test.loss:.4f}, accuracy {metrics.test.accuracy:.4f}; "
        f"{metrics.steps} steps, {metrics.stopped}"
    )


def note_steps(workdir: Path, groups: Sequence[Group]) -> None:
    """Notes in `sweep.json` how many steps each cell will take, for whoever asks for the status."""
    path = workdir / SWEEP
    told = read_record(workdir)
    steps = {cell.name: group.num_steps for group in groups for cell in group.cells}
    write_json(path, {**told, "num_steps": {**told["num_steps"], **steps}})


def by_base(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells, those of one model and data together."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(base_key(cell), []).append(cell)
    return list(found.values())
