"""`sweep.json`: the sweeps of a workdir, their cells, their steps, and who was refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.untrusted import check_fields
from lora_jax.train.workdir import is_folder_name, read_json_file

SWEEP = "sweep.json"
_FIELDS = {"sweeps": list, "cells": list, "refused": dict, "num_steps": dict}


def read_record(workdir: Path) -> dict[str, Any]:
    """The record of `workdir`, an empty one where there is none yet.

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
