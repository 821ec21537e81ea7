"""Cells in trackers (`lora_jax/trackers/`): one run per cell, each step once, however often the
training was killed and gone on with.

A tracker's own store says which step it has last. What is after it, and before the checkpoint that
the training goes on from, comes from metrics.jsonl; what the training repeats is left out. So a
step is sent once it is complete: a log and an evaluation of one step are one row.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.io.untrusted import check_fields, printable
from lora_jax.settings import config_hash, flat_config
from lora_jax.trackers.base import Tracker, numbers_of, without_passwords
from lora_jax.trackers.tensorboard import TensorBoard
from lora_jax.train.environment import git_commit
from lora_jax.train.loop import Training
from lora_jax.train.metrics import readable_metrics
from lora_jax.train.record import Card
from lora_jax.train.rows import MetricRows
from lora_jax.train.workdir import read_json_file

TRACKING = "tracking.json"


class Link:
    """The way to one tracker. At its first exception it is closed, with a line on stderr."""

    def __init__(self, tracker: Tracker):
        self.tracker, self.is_open = tracker, True
        self.name = str(getattr(tracker, "title", type(tracker).__name__))

    def call(self, function: Callable[..., Any], *values: Any) -> Any:
        """What the function returns; None if the link is closed."""
        if not self.is_open:
            return None
        try:
            return function(*values)
        except Exception as error:  # a tracker's library raises what it likes
            self.is_open = False
            line = " ".join(f"{type(error).__name__}: {error}".split())
            line = printable(without_passwords(line)[:300])
            print(
                f"{self.name}: {line}; the training goes on without it. Run the same command again "
                "later to send what is missing",
                file=sys.stderr,
            )
        return None


def make_links(trackers: Sequence[Tracker]) -> list[Link]:
    """Links to the trackers; none in other processes than the first."""
    return [Link(tracker) for tracker in trackers] if jax.process_index() == 0 else []


class TrackerRun:
    """A cell's run in one tracker."""

    def __init__(self, link: Link, cell: TrackedCell):
        # Each cell its own: what `start` stores is stored on it.
        self._tracker, self.link = copy.copy(link.tracker), link
        last = link.call(self._tracker.start, cell.name, cell.group, cell.settings, cell.run_id)
        self._last = -1 if last is None else last

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._last:
            self.link.call(self._tracker.log, step, numbers)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.link.call(self._tracker.finish, summary)


@dataclasses.dataclass
class TrackedCell:
    """A cell and its tracker runs. `folder` is None in memory."""

    name: str
    group: str
    settings: Mapping[str, Any]
    folder: Path | None = None
    run_id: str = dataclasses.field(default_factory=functools.partial(secrets.token_hex, 8))
    _complete: list[str] = dataclasses.field(default_factory=list)
    _runs: list[TrackerRun] = dataclasses.field(default_factory=list)
    _boards: Sequence[Link] = ()
    _pending: tuple[int, dict[str, float]] | None = None

    def start(self, links: Sequence[Link], boards: Sequence[Link] = ()) -> None:
        """Starts the runs, or goes on with them, with what metrics.jsonl has.

        `boards` write into the cell's folder, as TensorBoard does: they need no id.
        """
        if links and self.folder is not None:
            self._read()
        waiting = [link for link in links if link.name not in self._complete]
        self._boards = boards
        self._runs = [TrackerRun(link, self) for link in (*boards, *waiting)]
        if self._runs and self.folder is not None:
            for row in readable_metrics(self.folder / "metrics.jsonl"):
                split = row.get("split")
                if split in ("train", "validation"):  # those of the test come with the summary
                    self.row(row["step"], split, row)

    def row(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """More numbers of a step; those of an earlier one are complete, and sent."""
        self.reached(step)
        own = {f"{split}/{name}": value for name, value in numbers_of(values).items()}
        own.pop(f"{split}/step", None)
        self._pending = (step, {**(self._pending[1] if self._pending else {}), **own})

    def reached(self, step: int) -> None:
        """The training is at this step: earlier ones are complete."""
        if self._pending is not None and step > self._pending[0]:
            self._send()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the runs; the last step gets the summary's numbers.

        An empty summary is that of a training that may go on: its last step may lack something yet.
        """
        numbers = numbers_of(summary)
        if numbers and self._pending is None:
            self._pending = (int(summary.get("steps", 0)), {})
        if summary:
            self._send(numbers)
        runs, self._runs = self._runs, []
        for run in runs:
            run.finish(summary)
        if summary and self.folder is not None and (self.folder / TRACKING).exists():
            done = [run.link for run in runs if run.link not in self._boards and run.link.is_open]
            self._complete += [link.name for link in done]
            if done:
                self._write()

    def _send(self, more: Mapping[str, float] = MappingProxyType({})) -> None:
        if self._pending is None:
            return
        (step, numbers), self._pending = self._pending, None
        for run in self._runs:
            run.log(step, {**numbers, **more})

    def _read(self) -> None:
        """The cell's id, kept in its folder; without that file the next run is a new one."""
        assert self.folder is not None
        path = self.folder / TRACKING
        if not path.exists():
            self._write()
            return
        found = read_json_file(path)
        check_fields(found, {"run_id": str, "complete": list}, path, "remove it")
        if not re.fullmatch("[0-9a-f]{16}", found["run_id"]):
            raise RequestError(f"{path}: run_id is not of 16 hex digits; remove that file")
        self.run_id, self._complete = found["run_id"], [*map(str, found["complete"])]

    def _write(self) -> None:
        assert self.folder is not None
        values = {"run_id": self.run_id, "complete": sorted({*self._complete})}
        write_json(self.folder / TRACKING, values)


class Tracking(MetricRows, contextlib.AbstractContextManager):
    """Tracks the cells of one training; a context manager that ends runs left open.

    `finish` ends that of a cell with its summary; what else is open at the end is of a cell that
    failed, or of an interrupted training. `without` are metrics that say nothing here.
    """

    def __init__(
        self,
        cells: Sequence[TrackedCell],
        links: Sequence[Link],
        unit: str,
        boards: Sequence[Link] = (),
        without: Sequence[str] = (),
    ):
        super().__init__(unit)
        self._cells, self._links, self._boards, self._without = cells, links, boards, without
        self._training: Training | None = None

    def begin(self, training: Training) -> None:
        """Starts the runs of cells that are not finished."""
        self._training = training
        for cell in self._cells:
            if cell.folder is None or not (cell.folder / "card.json").exists():
                cell.start(self._links, self._boards)

    def row(self, training, k, split, values):
        kept = {name: value for name, value in values.items() if name not in self._without}
        self._cells[k].row(training.cells[k].progress.step, split, kept)

    def advanced(self, training):
        for k, cell in enumerate(self._cells):
            if not training.cells[k].ended:  # its last step waits for the summary
                cell.reached(training.step)

    def finish(self, k: int, summary: Mapping[str, Any]) -> None:
        """The results of cell k."""
        self._cells[k].finish(summary)

    def __exit__(self, kind, error, trace) -> None:
        if self._training is None:
            return
        for cell, ended in zip(self._cells, self._training.cells, strict=True):
            cell.finish({"error": ended.error} if ended.error else {})


def track_on_disk(
    folders: Sequence[Path],
    configs: Sequence[Mapping[str, Any]],
    links: Sequence[Link],
    group: str,
    unit: str,
) -> Tracking:
    """The tracking of cells on disk, by their folders and plain configs; TensorBoard's too."""
    commit = _commit() if links else ""
    cells = [
        _cell_on_disk(folder, config, group, commit)
        for folder, config in zip(folders, configs, strict=True)
    ]
    return Tracking(cells, links, unit, make_links([TensorBoard(folders[0].parent)]))


def track_finished(folder: Path, card: Card, links: Sequence[Link], group: str) -> None:
    """Sends what trackers lack of a finished cell: one was away while it trained, or is new."""
    if not any(link.is_open for link in links):
        return
    cell = _cell_on_disk(folder, card.config, group, card.commit)
    cell.start(links)
    cell.finish(summary_of(card))


def summary_of(card: Card) -> dict[str, Any]:
    """A card's metrics, flat: those of the best step, which validation chose, are `best/…`."""
    flat = flat_config(card.metrics.to_json())
    names = {"validation.best_step": "best/step"}
    return {
        names.get(name, name.replace("validation.", "best/").replace(".", "/")): value
        for name, value in flat.items()
    }


def _cell_on_disk(folder: Path, config: Mapping[str, Any], group: str, commit: str) -> TrackedCell:
    settings = {
        **flat_config(config),
        "config_hash": config_hash(config),
        "commit": commit,
        "workdir": str(folder.parent.parent),
    }
    return TrackedCell(folder.name, group, settings, folder)


_commit = functools.cache(git_commit)
