"""Trackio: a local SQLite database per project, or a Space of Hugging Face's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from lora_jax.trackers.base import library


class Trackio:
    """Logs to Trackio; needs the extra `trackio`.

    Trackio knows a run by its name alone, so runs are called NAME-ID, where ID are the first eight
    digits of the cell's id: cells of the same name in two workdirs stay apart.

    Args:
      project: None for TRACKIO_PROJECT, or "lora_jax".
      options: more arguments of `trackio.init`: `space_id="user/space"`, …

    Raises:
      ModuleNotFoundError: trackio is not installed.
    """

    def __init__(self, project: str | None = None, **options: Any):
        self._trackio = library("trackio", "Trackio")
        self._project = project or os.environ.get("TRACKIO_PROJECT") or "lora_jax"
        self.title = f"trackio:{self._project}"
        # Cells share a process, and its processor: what that does is no cell's own.
        self._options = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False, **options}

    def start(self, name: str, group: str, settings: Mapping[str, Any], run_id: str) -> int | None:
        # It prints to stdout, which is the command's own (`--json`).
        with contextlib.redirect_stdout(sys.stderr):
            self._run = self._trackio.init(
                project=self._project, name=f"{name}-{run_id[:8]}", group=group or None,
                config=dict(settings), resume="allow", **self._options,
            )  # fmt: skip
        # It ends "the" run of the process when another one starts, and cells train together.
        library("trackio.context_vars", "Trackio").current_run.set(None)
        last = self._run._next_step - 1  # it has no public name, and is as in the store
        return last if last >= 0 else None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
