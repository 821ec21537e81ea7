"""What a repository of a run holds: PEFT's adapter and the card, and the run's record in `cells/`.

    README.md                                     the model card
    adapter_config.json                           the adapter for PEFT, transformers and vLLM
    adapter_model.safetensors, head.safetensors
    cells/NAME/card.json, test_predictions.npz    what `verify` compares
    cells/NAME/config.json, metrics.jsonl         what `report`, `evaluate` and `predict` read
    cells/NAME/adapter/                           the trained arrays as the card's hash has them
    cells/OTHER/card.json, test_predictions.npz   the other cells of its pack

So a pulled folder is PEFT's folder and a workdir with one run at once. The arrays travel twice:
PEFT's files have another layout (PiSSA another rank), from which the bits that the card's hash is
of do not always come back.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.io.run_adapter import DESCRIPTION, TENSORS
from lora_jax.io.untrusted import read_regular
from lora_jax.train.record import Card
from lora_jax.train.workdir import is_folder_name

CARD = "README.md"
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_AT_ROOT = (CARD, PEFT_CONFIG, PEFT_TENSORS, "head.safetensors")
# Of every cell of the pack; a cell that failed has no card, but its pack needs its config.
_OF_PACK = ("card.json", "test_predictions.npz")
_OF_FAILED = ("config.json", "failure.json")
_OF_RUN = (*_OF_PACK, "config.json", "metrics.jsonl")
_OF_ADAPTER = (f"adapter/{DESCRIPTION}", f"adapter/{TENSORS}")
_OF_CELL = {*_OF_RUN, *_OF_FAILED, *_OF_ADAPTER}


def is_ours(name: str) -> bool:
    """Whether `push` writes a file of this name, and `pull` therefore takes it.

    >>> is_ours("cells/r8/card.json"), is_ours("cells/../card.json"), is_ours("config.json")
    (True, False, False)
    """
    if name in _AT_ROOT:
        return True
    folder, *rest = name.split("/", 2)
    return folder == "cells" and len(rest) == 2 and is_folder_name(rest[0]) and rest[1] in _OF_CELL


def leads_outside(name: str) -> bool:
    """Whether a file of this name in a folder would lie elsewhere.

    >>> leads_outside("a/b.txt"), leads_outside("a/../../b.txt"), leads_outside("/etc/passwd")
    (False, True, True)
    """
    return not name or "\0" in name or name.startswith("/") or ".." in name.split("/")


def copy_record(cell: Path, card: Card, folder: Path) -> list[str]:
    """Copies the record of the finished run `cell` and of its pack into `folder`/cells.

    Returns the names of the pack's cells that are not there any more. Raises `RequestError` for a
    file that is missing, or that is a link.
    """
    to = folder / "cells" / cell.name
    _copy(cell, to, (*_OF_RUN, *_OF_ADAPTER))
    missing = []
    for name in card.program.cells or ():
        other = cell.parent / name
        if name == cell.name:
            continue
        files = next((f for f in (_OF_PACK, _OF_FAILED) if _has(other, f)), None)
        if files is None:
            missing.append(name)
        else:
            _copy(other, folder / "cells" / name, files)
    return missing


def sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file in the folder, by its name there, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _has(cell: Path, files: tuple[str, ...]) -> bool:
    return all((cell / file).is_file() for file in files)


def _copy(cell: Path, to: Path, files: tuple[str, ...]) -> None:
    for file in files:
        path = cell / file
        if path.is_symlink():
            raise RequestError(
                f"{path} is a link to {os.readlink(path)!r}; put the file in its place"
            )
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            (to / file).write_bytes(read_regular(path))
        except OSError as error:
            raise RequestError(
                f"cannot copy {path}: {error.strerror or error}; put it back, or train the cell "
                "again"
            ) from error
