"""What a sweep's workdir records: `sweep.json`, and each pack's `pack.json`."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.io.untrusted import check_fields
from lora_jax.settings import Settings, plain_config
from lora_jax.train.cell import Cell
from lora_jax.train.workdir import check_inside, is_folder_name, read_json_file

SWEEP = "sweep.json"
_FIELDS = {"sweeps": list, "cells": list, "refused": dict, "num_steps": dict}


def read_record(workdir: Path) -> dict[str, Any]:
    """sweep.json: the sweeps, their cells, their steps, and who was refused; empty if none is.

    Raises `RequestError` for a damaged one, and for cells that cannot be folders of the workdir.
    """
    path = workdir / SWEEP
    if not path.exists():
        return {"sweeps": [], "cells": [], "refused": {}, "num_steps": {}}
    found = read_json_file(path)
    check_fields(found, _FIELDS, path, "restore that file")
    for name in found["cells"]:
        if not is_folder_name(name):
            raise RequestError(f"{path} names a cell {name!r}; restore that file")
    for one in found["sweeps"]:
        check_fields(one, {"name": str, "source": str}, f"{path}, sweeps", "restore that file")
    for name, steps in found["num_steps"].items():
        if type(steps) is not int:
            raise RequestError(f"{path}: num_steps of {name!r} is {steps!r}; restore that file")
    return found


@dataclasses.dataclass(frozen=True)
class PackRecord:
    """A pack's cells in the order of their lanes, and the memory budget they were divided by."""

    cells: tuple[Cell, ...]
    memory_bytes: int

    @property
    def name(self) -> str:
        """The folder's name: the same cells in the same lanes are the same pack."""
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
        check_inside(self.folder(workdir))
        values = {"cells": cells, "memory_bytes": self.memory_bytes}
        write_json(self.folder(workdir) / "pack.json", values)


def read_packs(workdir: Path) -> list[PackRecord]:
    """The packs that were begun in `workdir`. Raises `RequestError` for a damaged record."""
    return [_read_pack(path) for path in sorted((workdir / "packs").glob("*/pack.json"))]


def _read_pack(path: Path) -> PackRecord:
    check_inside(path.parent)
    values: Any = read_json_file(path)
    try:
        cells = [Cell(one["name"], Settings.from_config(one["config"])) for one in values["cells"]]
        record = PackRecord(tuple(cells), values["memory_bytes"])
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
    return record
