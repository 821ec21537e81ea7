"""Running the cells of a sweep: packs and cells alone; what is finished is not run again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import write_json
from lora_jax.io.paths import at_home
from lora_jax.io.untrusted import check_fields
from lora_jax.settings import plain_config
from lora_jax.sweeps.cells import Cell, Sweep, Tuning, best_point, choose_value, value_text
from lora_jax.sweeps.record import SWEEP, read_record
from lora_jax.sweeps.runner import device_memory_bytes
from lora_jax.sweeps.view import SweepView
from lora_jax.sweeps.workdir import Result, Workdir, by_base, pack_text
from lora_jax.trackers.base import Tracker
from lora_jax.train import enable_compilation_cache
from lora_jax.train.build import load_base
from lora_jax.train.callbacks import Options
from lora_jax.train.loop import Callback, Diverged
from lora_jax.train.signals import stop_requests
from lora_jax.train.tracking import make_links
from lora_jax.train.workdir import check_cell, lock_workdir, read_json_file


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike,
    *,
    source: str = "",
    add: bool = False,
    memory_bytes: int | None = None,
    progress: bool = True,
    command: str = "",
    mesh: Mesh | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Tracker] = (),
) -> dict[str, Result]:
    """Trains every cell into `workdir/cells/NAME`; returns `{name: card, or the cell's error}`.

    Cells whose shapes agree train as one program (see `groups`), those of full fine-tuning one
    after another. Stopped in whatever way, the same call goes on where it was: finished cells are
    not run again, packs keep their cells and lanes. A cell that cannot be run, or whose loss
    is not finite, is reported and the others still run. `source` (the config, "FILE.py[:arg]") is
    noted in every card, its file and the sweep's name in the workdir; `add` lets another sweep in.
    `memory_bytes` is what a pack may hold of each device (default: what it has, half of the host's
    memory on CPU). On `mesh` the cells of a pack are divided over `cell`, and each trains on what
    is left. `callbacks` are those of every pack, and of every cell that trains alone. `trackers`
    (`lora_jax.trackers`) get the metrics of each cell in a run of its own, grouped by the sweep's
    name, and what they lack of finished cells. Raises what concerns all: a workdir in use or of
    another sweep, cells begun with other settings, an interruption.
    """
    workdir, config_file = at_home(workdir), source
    source = source.partition(":")[0]
    with lock_workdir(workdir), SweepView(enabled=progress) as view:
        check_sweep(sweep, workdir, source=source, add=add)
        enable_compilation_cache()
        budget = memory_bytes or device_memory_bytes(1 if mesh is None else mesh.size)
        options = Options(
            command=command or "run the sweep again with the same workdir",
            config_file=config_file, callbacks=callbacks, links=make_links(trackers),
            group=sweep.name, progress=progress, show_with=view.show_with,
        )  # fmt: skip
        runner = Workdir(memory_bytes=budget, folder=workdir, view=view, options=options, mesh=mesh)

        def run(some: Sequence[Cell]) -> None:
            view.expect(len(some))
            finished, waiting = runner.finished(some)
            runner.results |= finished
            if finished:
                view.say(f"{len(finished)} of {len(some)} cells are finished already")
            runner.run(waiting)

        note_sweep(sweep, workdir, source)
        # One for all: a signal that comes between two trainings stops the sweep there.
        with stop_requests():
            run(sweep.first)
            more = []
            for tuning in sweep.tunings:
                more += _more_cells(tuning, runner.results, workdir, view)
            run(more)
        note_sweep(sweep, workdir, source, runner.results)
        return runner.results


def plan_sweep(
    sweep: Sweep, workdir: str | os.PathLike, *, source: str = "", add: bool = False
) -> list[str]:
    """What would run, as lines: which cells share a program, which run alone, which are done.

    Nothing is compiled, so a memory budget may divide a program yet; nothing is trained or written.
    Raises `RequestError` for a workdir as `run_sweep` would.
    """
    workdir = Path(workdir)
    check_sweep(sweep, workdir, source=source, add=add)
    silent = SweepView(enabled=False)
    there = Workdir(memory_bytes=device_memory_bytes(), folder=workdir, view=silent)
    finished, waiting = there.finished(sweep.first)
    lines = [
        f"failed: {name}: {result}" if isinstance(result, RequestError) else f"finished: {name}"
        for name, result in finished.items()
    ]
    for cells in by_base(waiting):
        try:
            packs, refused = there.packs_of(cells, load_base(cells[0].config))
        except RequestError as error:
            packs, refused = [], {cell.name: error for cell in cells}
        lines += map(pack_text, packs)
        lines += [f"refused: {name}: {why}" for name, why in refused.items()]
    for tuning in sweep.tunings:
        if tuning.more_seeds:
            count = len(tuning.more_seeds)
            what = " and ".join(tuning.keys)
            lines.append(f"later: {tuning.name}, the best {what}, {count} more seeds")
    return lines


def check_sweep(sweep: Sweep, workdir: Path, *, source: str, add: bool) -> None:
    """Raises `RequestError` if `workdir` belongs to another sweep or config."""
    for cell in sweep.first:
        check_cell(workdir / "cells" / cell.name, plain_config(cell.config))
    there = read_record(workdir)["sweeps"]
    if add or not (workdir / SWEEP).exists():
        return
    if {"name": sweep.name, "source": Path(source).name} not in there:
        names = ", ".join(f"{one['name']!r} of {one['source']}" for one in there)
        raise RequestError(
            f"workdir {workdir} is of another sweep, {names}; choose another workdir, or --add to "
            f"train {sweep.name!r} there, too"
        )


def note_sweep(
    sweep: Sweep, workdir: Path, source: str, results: Mapping[str, Result] | None = None
) -> None:
    """Notes in `sweep.json` which sweeps the workdir holds, their cells, and who was refused."""
    path = workdir / SWEEP
    there = read_record(workdir)
    one = {"name": sweep.name, "source": Path(source).name}
    there["sweeps"] += [] if one in there["sweeps"] else [one]
    names = [cell.name for cell in sweep.first] + list(results or ())
    earlier = there["cells"]
    if there["sweeps"] == [one]:
        # A cell that the sweep no longer has, and that never began, is nobody's.
        own = set(names)
        earlier = [n for n in earlier if n in own or (workdir / "cells" / n).exists()]
    there["cells"] = list(dict.fromkeys([*earlier, *names]))
    for name, result in (results or {}).items():
        there["refused"].pop(name, None)
        if isinstance(result, RequestError) and not isinstance(result, Diverged):
            there["refused"][name] = str(result)
    write_json(path, there)


def _more_cells(
    tuning: Tuning, results: Mapping[str, Result], workdir: Path, view: SweepView
) -> list[Cell]:
    """The tuned arm's cells of the other seeds; notes what was chosen and from what."""
    losses = []
    for cell in tuning.first:
        result = results[cell.name]
        if isinstance(result, RequestError) and not isinstance(result, Diverged):
            view.say(f"{tuning.name}: nothing chosen, since {cell.name} was not run")
            return []
        failed = isinstance(result, RequestError)
        losses.append(math.inf if failed else result.metrics.validation.loss)
    choice = choose_value(tuning, losses)
    what = " and ".join(tuning.keys)
    if (point := best_point(tuning, choice)) is None:
        view.say(f"{tuning.name}: no {what} gave a number; nothing chosen")
        return []
    path = workdir / "tuned.json"
    tuned = read_json_file(path) if path.exists() else {}
    check_fields(tuned, {}, path, "restore it, or remove it")
    write_json(path, {**tuned, tuning.name: choice})
    edge = "; at the edge of those tried: a better one may lie beyond" if choice["at_edge"] else ""
    shown = " and ".join(map(value_text, point))
    view.say(f"{tuning.name}: {what} {shown} is best on validation{edge}")
    return tuning.more(point)
