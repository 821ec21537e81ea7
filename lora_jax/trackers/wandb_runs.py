"""Weights & Biases, online or into its local files."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.trackers.base import library

# A file of its offline mode is a log as LevelDB has it: a head of 7 bytes, then blocks; in a block
# parts of records, each with a checksum (4 bytes), a length (2) and a kind (1).
BLOCK, HEAD, PART = 2**15, 7, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandB:
    """Logs to Weights & Biases; needs the extra `wandb`.

    Whether online or offline is as `wandb` is set up: WANDB_MODE, `wandb offline`.

    Args:
      project: None for WANDB_PROJECT, or "lora_jax".
      options: more arguments of `wandb.init`: `entity=…`, `mode="offline"`, `dir=…`, `tags=…`.

    Raises:
      RequestError: it is online, and nobody is logged in.
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, project: str | None = None, **options: Any):
        self._wandb = library("wandb", "WandB")
        self._project = project or os.environ.get("WANDB_PROJECT") or "lora_jax"
        self.title = f"wandb:{self._project}"
        self._options = options
        is_online = options.get("mode") == "online" or not (
            options.get("mode") or self._wandb.setup().settings._offline
        )
        if is_online:
            self._log_in()

    def _log_in(self) -> None:
        """Asks for the key now, if there is a terminal and none is known, not in the training."""
        try:
            self._wandb.login()
        except self._wandb.errors.Error as error:
            line = str(error).partition("\n")[0].rstrip(".")
            raise RequestError(
                f"W&B: {line}; log in, or set WANDB_MODE=offline and `wandb sync` later"
            ) from error

    def start(self, name: str, group: str, settings: Mapping[str, Any], run_id: str) -> int | None:
        # Several cells train at once, none of them "the" run of the process; what the process
        # prints, and what the machine does, is no cell's own.
        quiet = self._wandb.Settings(console="off", quiet=True, x_disable_stats=True)
        self._run = self._wandb.init(
            project=self._project, name=name, group=group or None, id=run_id, resume="allow",
            config=dict(settings), allow_val_change=True, reinit="create_new", settings=quiet,
            **self._options,
        )  # fmt: skip
        known = self._run.starting_step - 1  # of a resumed run; -1 of a new one
        if self._run.offline:
            folder = Path(self._run.settings.wandb_dir)
            known = max([known, *_steps_on_disk(folder, run_id)])
        return known if known >= 0 else None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step, commit=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary and "error" not in summary else 1)


def _steps_on_disk(folder: Path, run_id: str) -> Iterator[int]:
    """The steps that local files have of a run, by whichever process they were written.

    In offline mode nobody else can tell, and a killed process's files lack its last seconds.
    """
    for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                yield record.history.step.num


def read_records(path: Path) -> Iterator[Any]:
    """The records (`wandb.proto.wandb_internal_pb2.Record`) of a `.wandb` file, but a torn one."""
    messages = library("wandb.proto.wandb_internal_pb2", "WandB")
    content = path.read_bytes()
    place, parts = HEAD, b""
    while place + PART <= len(content):
        left = BLOCK - place % BLOCK
        if left < PART:  # too little for another part: zeros to the block's end
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + PART])
        part = content[place + PART : place + PART + length]
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or len(part) < length:
            return
        parts = part if kind in (WHOLE, FIRST) else parts + part
        place += PART + length
        if kind in (WHOLE, LAST):
            yield messages.Record.FromString(parts)
