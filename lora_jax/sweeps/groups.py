"""Cells of a command-line sweep, grouped by what must agree before they can share a program."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.models import Model
from lora_jax.settings import Settings, flat_config, plain_config
from lora_jax.sweeps.cells import Cell
from lora_jax.sweeps.plan import Planned, make_plan
from lora_jax.sweeps.settings import CellSettings
from lora_jax.train.build import Base, make_method, plan_steps
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.workdir import check_inside, is_folder_name, read_json_file


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that train as one program, or one cell that trains alone."""

    cells: tuple[Cell, ...]
    plan: Planned
    num_steps: int

    @property
    def is_pack(self) -> bool:
        """Whether it is more than one cell."""
        return len(self.cells) > 1

    def __str__(self) -> str:
        if self.is_pack:
            return str(self.plan)
        return f"alone: {self.cells[0].name}"


def make_groups(cells: Sequence[Cell], base: Base) -> tuple[list[Group], dict[str, RequestError]]:
    """The groups of cells that share `base`, in order of their first cells; and who is refused.

    A cell that cannot be run (an impossible rank, a bad rate) is refused, the others still run.
    """
    refused: dict[str, RequestError] = {}
    families: dict[str, list[tuple[Cell, CellSettings]]] = {}
    num_steps: dict[str, int] = {}
    for cell in cells:
        try:
            steps = _num_steps(cell, base)
            settings = cell_settings(cell, base.model_of(cell.config.seed), steps)
            key = shared_key(cell, base.model, settings)
        except RequestError as error:
            refused[cell.name] = error
            continue
        families.setdefault(key, []).append((cell, settings))
        num_steps[cell.name] = steps
    groups = []
    for family in families.values():
        by_name = {cell.name: cell for cell, _ in family}
        planned, impossible = make_plan([settings for _, settings in family], base.model.params)
        refused |= {name: RequestError(why) for name, why in impossible.items()}
        for plan in planned:
            members = tuple(by_name[settings.name] for settings in plan.cells)
            groups.append(Group(members, plan, num_steps[members[0].name]))
    order = {cell.name: place for place, cell in enumerate(cells)}
    return sorted(groups, key=lambda group: order[group.cells[0].name]), refused


def cell_settings(cell: Cell, model: Model, num_steps: int) -> CellSettings:
    """A config's cell as packs take them. Raises `RequestError` for settings out of range."""
    config = cell.config
    config.check()
    make_optimizer(config.optimizer, num_steps)  # for what its settings mean together
    return CellSettings(
        name=cell.name,
        settings=flat_config(plain_config(config)),
        method=make_method(config.method, model),
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        seed=config.seed,
    )


def shared_key(cell: Cell, model: Model, settings: CellSettings) -> str:
    """Cells of one key may share a program, if their shapes agree."""
    # A new head that stays frozen differs by seed.
    return cell.config.program_key(with_seed=not _whole_head(model, settings))


def _whole_head(model: Model, settings: CellSettings) -> bool:
    if not model.head_is_new:
        return True
    whole = set(settings.method.whole_paths(model.params))
    heads = [p for p in trees.flatten(model.params).paths if re.fullmatch(model.head_pattern, p)]
    return whole.issuperset(heads)


def _num_steps(cell: Cell, base: Base) -> int:
    batches = base.train_batches_of(cell.config)
    return plan_steps(cell.config.train, batches.steps_per_epoch)["num_steps"]


@dataclasses.dataclass(frozen=True)
class PackRecord:
    """A pack's cells in the order of their slots, and the memory budget they were divided by."""

    cells: tuple[Cell, ...]
    memory_bytes: int

    @property
    def name(self) -> str:
        """The folder's name: the same cells in the same slots are the same pack."""
        text = "\n".join(f"{cell.name} {cell.hash}" for cell in self.cells)
        return f"pack-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def folder(self, workdir: Path) -> Path:
        return workdir / "packs" / self.name

    def has_checkpoint(self, workdir: Path) -> bool:
        """Whether anything of it was trained and saved."""
        return any((self.folder(workdir) / "checkpoints").glob("[0-9]*"))

    def write(self, workdir: Path) -> None:
        """Writes `packs/NAME/pack.json`, atomically."""
        cells = [{"name": c.name, "config": plain_config(c.config)} for c in self.cells]
        told = {"cells": cells, "memory_bytes": self.memory_bytes}
        check_inside(self.folder(workdir))
        write_json(self.folder(workdir) / "pack.json", told)


def read_packs(workdir: Path) -> list[PackRecord]:
    """The packs that were begun in `workdir`. Raises `RequestError` for a damaged record."""
    found = []
    for path in sorted((workdir / "packs").glob("*/pack.json")):
        check_inside(path.parent)
        told: Any = read_json_file(path)
        try:
            cells = [
                Cell(one["name"], Settings.from_config(one["config"])) for one in told["cells"]
            ]
            record = PackRecord(tuple(cells), told["memory_bytes"])
            name = record.name
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"{path} is no pack's record; remove its folder") from error
        for cell in cells:
            if not is_folder_name(cell.name):
                raise RequestError(
                    f"{path} names a cell {cell.name!r}, which cannot be a folder's name; remove "
                    "the pack's folder"
                )
        if not isinstance(record.memory_bytes, int | float) or name != path.parent.name:
            raise RequestError(
                f"{path} is not the record of {path.parent.name}: its cells or memory_bytes were "
                "changed; remove its folder"
            )
        found.append(record)
    return found
