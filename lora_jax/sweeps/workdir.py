"""The engine of `lora-jax sweep`: the cells of a workdir, and the packs that were begun there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.sweeps.groups import make_groups
from lora_jax.sweeps.pack import Pack
from lora_jax.sweeps.prepared import make_ready
from lora_jax.sweeps.program import default_at_once
from lora_jax.sweeps.record import SWEEP, PackRecord, read_packs, read_record
from lora_jax.sweeps.runner import Ready, Runner
from lora_jax.sweeps.stored import read_failure, train_pack, write_failure
from lora_jax.sweeps.view import SweepView
from lora_jax.train import train_cell
from lora_jax.train.build import Base, load_base
from lora_jax.train.callbacks import Options
from lora_jax.train.cell import Cell
from lora_jax.train.loop import Diverged
from lora_jax.train.record import Card
from lora_jax.train.signals import Interrupted, stop_requests
from lora_jax.train.tracking import track_finished

Result = Card | RequestError


@dataclasses.dataclass(kw_only=True)
class Workdir(Runner):
    """The cells of one workdir: finished ones are passed over, begun ones are gone on with."""

    folder: Path
    view: SweepView
    options: Options = Options()
    mesh: Mesh | None = None
    _bases: dict[str, Base] = dataclasses.field(default_factory=dict)
    _ready: list[Ready] = dataclasses.field(default_factory=list)

    def say(self, line):
        self.view.say(line)

    def packs(self, cells):
        for same in by_base(cells):
            try:
                packs, refused = self.packs_of(same, self._base_of(same[0]))
            except RequestError as error:
                yield [], {cell.name: error for cell in same}
                continue
            yield [], refused
            record = read_record(self.folder)
            for pack in packs:  # for `sweep --status`
                record["num_steps"] |= {cell.name: pack.num_steps for cell in pack.cells}
            write_json(self.folder / SWEEP, record)
            for number, pack in enumerate(packs, 1):
                self.view.expect(0, len(pack.cells) * pack.num_steps)
                self.say(f"program {number} of {len(packs)}: {pack_text(pack)}")
            yield packs, {}

    def finished(self, cells: Sequence[Cell]) -> tuple[dict[str, Result], list[Cell]]:
        """The results of cells that are finished, or failed for good; and the other cells."""
        results, waiting = {}, []
        for cell in cells:
            folder = self.folder / "cells" / cell.name
            if (folder / "card.json").exists():
                card = results[cell.name] = Card.read(folder / "card.json")
                track_finished(folder, card, self.options.links, self.options.group)
            elif (failure := read_failure(folder)) is not None:
                results[cell.name] = failure
            else:
                waiting.append(cell)
                continue
            self.view.ended(failed=isinstance(results[cell.name], RequestError))
        return results, waiting

    def between(self):
        """Stops the sweep at a signal; a training that is under way saves and stops by itself."""
        with stop_requests() as requested:
            if requested():
                done = sum(not isinstance(r, RequestError) for r in self.results.values())
                raise Interrupted(
                    f"stopped by {requested()} with {done} cells done; all is saved in "
                    f"{self.folder}. To go on: {self.options.command}"
                )

    def ended(self, name, result):
        failed = isinstance(result, RequestError)
        self.view.ended(failed=failed)
        self.say(f"{name}: {f'failed: {result}' if failed else _one_line(result)}")

    def failure(self, error):
        if isinstance(error, RequestError):
            return error
        text = str(error)
        of_memory = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and of_memory:
            return RequestError(
                f"the device ran out of memory ({text.splitlines()[0][:200]}); run the same "
                "command with a smaller --memory-gib, or smaller batches"
            )
        return None  # a defect of ours

    def ready(self, pack):
        if len(pack.cells) == 1:
            return None
        if pack.cells[0].config.optimizer.offload:
            self.say("optimizer.offload is for cells alone; a pack's moments are small")
        made = make_ready(pack, self._base_of(pack.cells[0]), at_once=default_at_once())
        # With the program of an earlier pack where it is the same.
        for other in self._ready:
            if _same_program(other.pack, pack):
                return dataclasses.replace(made, program=other.program)
        self._ready.append(made)
        return made

    def is_begun(self, pack):
        return PackRecord(pack.cells, self.memory_bytes).has_checkpoint(self.folder)

    def divide(self, pack, parts):
        base = self._base_of(pack.cells[0])
        packs = [make_groups([pack.cells[k] for k in part], base)[0][0] for part in parts]
        for part in packs:
            # All now: killed after the first, the rest must not be divided anew.
            if len(part.cells) > 1:
                PackRecord(part.cells, self.memory_bytes).write(self.folder)
        return packs

    def train(self, pack, ready, needed):
        base = self._base_of(pack.cells[0])
        with self.view.running(len(pack.cells), pack.num_steps):
            if ready is not None:
                limit = self.memory_bytes
                return train_pack(ready, base, self.folder, self.options, memory_bytes=limit)
            cell = pack.cells[0]
            folder = self.folder / "cells" / cell.name
            try:
                return {cell.name: train_cell(cell.config, folder, self.options, base=base)}
            except Diverged as error:
                return {cell.name: write_failure(folder, str(error), [folder])}

    def packs_of(
        self, cells: Sequence[Cell], base: Base
    ) -> tuple[list[Pack], dict[str, RequestError]]:
        """Packs that were begun as they were begun, cells begun alone alone, the rest anew.

        A pack counts as begun once it has a checkpoint, and before that while the memory budget is
        the same: then it was divided off from others that may have ended.
        """
        waiting = {cell.name: cell for cell in cells}
        packs: list[Pack] = []
        refused: dict[str, RequestError] = {}

        def plan(some: Sequence[Cell]) -> list[Pack]:
            made, impossible = make_groups(some, base)
            packs.extend(made)
            refused.update(impossible)
            return made

        for record in read_packs(self.folder):
            if self._was_begun(record, waiting):
                made = plan([waiting.pop(cell.name, None) or cell for cell in record.cells])
                if [len(pack.cells) for pack in made] != [len(record.cells)]:
                    raise RequestError(
                        f"{record.folder(self.folder)} was begun by a version that let its cells "
                        "share a program, which they do not here; use that version, or remove it "
                        "and the folders of its cells"
                    )
        for name in list(waiting):
            if (self.folder / "cells" / name / "checkpoints").exists():
                plan([waiting.pop(name)])
        plan(list(waiting.values()))
        return packs, refused

    def _was_begun(self, record: PackRecord, waiting: Mapping[str, Cell]) -> bool:
        """Whether cells of this pack wait, and it is to be gone on with."""
        mine = [cell for cell in record.cells if cell.name in waiting]
        same = [cell for cell in mine if waiting[cell.name].hash == cell.hash]
        saved = record.has_checkpoint(self.folder)
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
        key = cell.config.base_key
        if key not in self._bases:
            self._bases.clear()  # one model in memory at a time
            self._ready.clear()
            self._bases[key] = load_base(cell.config, self.mesh)
            for note in self._bases[key].splits.notes:
                self.view.say(note)
        return self._bases[key]


def pack_text(pack: Pack) -> str:
    """The pack in a line."""
    names = [cell.name for cell in pack.cells]
    return f"alone: {names[0]}" if len(names) == 1 else str(pack)


def _same_program(one: Pack, other: Pack) -> bool:
    """Whether two packs of one base compile to one program at equal widths."""
    keys = [
        (pack.union, pack.num_steps, pack.cells[0].config.program_key()) for pack in (one, other)
    ]
    return keys[0] == keys[1]


def _one_line(card: Card) -> str:
    metrics = card.metrics
    return (
        f"test loss {metrics.test.loss:.4f}, accuracy {metrics.test.accuracy:.4f}; "
        f"{metrics.steps} steps, {metrics.stopped}"
    )


def by_base(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells, those of one model and data together."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.config.base_key, []).append(cell)
    return list(found.values())
