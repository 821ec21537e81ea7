"""`lora-jax sweep`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence

import lora_jax as lj
from lora_jax.cli.parser import (
    MESH,
    OVERRIDES,
    Parser,
    add_mesh,
    add_track,
    mesh_of,
    say,
    trackers_of,
)
from lora_jax.cli.requests import ALL_SETTINGS, config_file, config_name, needs_config

EXAMPLES = f"""\
{OVERRIDES}; it then holds for every cell that the sweep does not set.

Examples:
  lora-jax sweep --config=reviews_minilm:lora,demo --sweep=demo --workdir=runs/demo
  lora-jax sweep --config=reviews_minilm --sweep=full_size --workdir=w --plan
  lora-jax sweep --status --workdir=runs/demo        from another terminal, while it runs
  lora-jax report runs/demo

A sweep is a function in the config's file:
  def sweep_rank(add):
    for rank in (1, 2, 4, 8):
      add(f"r{{rank}}", **{{"method.rank": rank}})

With tune, an arm runs once for each value; the one with the best validation loss then runs
with more seeds. What was chosen, and from what, is in WORKDIR/tuned.json:
      add("r8", tune=("optimizer.lr", (1e-4, 1e-3)), more_seeds=(1, 2), **{{"method.rank": 8}})
tune={{setting: values, …}} tries all combinations; tune_seeds=(100, 101) choose by their mean loss,
so that no seed is reported that chose; tune_with={{"data.eval_limit": 1000}} is theirs alone.

Cells that differ in targets, rank, alpha, dropout, init, learning rate, weight decay and seed alone
train as one program over one copy of the base (ranks padded to 8, 16, 32, …); the rest, and full
fine-tuning, one after another. --plan says which. A finished cell is not run again; a stopped sweep
goes on where it was.

{ALL_SETTINGS}

{MESH}
cell, of sweeps alone: each device has cells of its own, and the whole base; nothing is sent between
them. What trains alone has those devices as data, where they divide its batch.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("sweep", epilog=EXAMPLES)
    parser.add_argument("--config", metavar="FILE.py[:arg]", help="the experiment (required)")
    parser.add_argument("--sweep", help="NAME of a sweep_NAME in that file (required)")
    parser.add_argument("--workdir", required=True, help="folder of the runs")
    parser.add_argument("--only", metavar="TEXT", help="only cells whose name contains TEXT")
    parser.add_argument(
        "--tune-only",
        action="store_true",
        help="stop once the values are chosen, so that a grid whose best is at its edge can grow "
        "before other seeds run; the same command without it goes on",
    )
    parser.add_argument("--add", action="store_true", help="add to the other sweep in the workdir")
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="N",
        help="what a pack may hold of each device (default: 90%% of its memory, on CPU half the "
        "host's)",
    )
    parser.add_argument("--plan", action="store_true", help="say what shares a program, and stop")
    parser.add_argument(
        "--status", action="store_true", help="say how far the workdir is, and stop"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    add_track(parser)
    add_mesh(parser, "cell=8")
    options, config = parser.parse_with_config(argv)
    if options.status:
        return _status(options)
    config = needs_config(config, "sweep")
    if not options.sweep:
        parser.error("--sweep is missing: NAME of a sweep_NAME in the config's file")
    if options.memory_gib is not None and not 2**-30 <= options.memory_gib < 2**30:
        parser.error(f"--memory-gib is {options.memory_gib:g}; it must be above 0, and finite")

    from lora_jax.sweeps import plan_sweep, read_sweep, run_sweep

    file = config_file(argv)
    sweep = read_sweep(file, options.sweep, config)
    if options.only:
        sweep = sweep.only(options.only)
    if options.tune_only:
        if not sweep.tunings:
            parser.error(f"--tune-only: the sweep {sweep.name!r} tunes nothing; leave it out")
        sweep = sweep.choosing()
    mesh = mesh_of(options, has_cells=True)
    if options.plan:
        lines = plan_sweep(sweep, options.workdir, source=file, add=options.add)
        say(json.dumps(lines) if options.json else "\n".join(lines))
        return 0
    results = run_sweep(
        sweep, options.workdir, source=config_name(argv), add=options.add, mesh=mesh,
        memory_bytes=options.memory_gib and int(options.memory_gib * 2**30),
        progress=not options.no_progress, command=shlex.join(["lora-jax", "sweep", *argv]),
        trackers=trackers_of(options),
    )  # fmt: skip
    failed = [name for name, result in results.items() if isinstance(result, lj.RequestError)]
    found = {name: str(r) if name in failed else r for name, r in results.items()}
    done = f"{len(results) - len(failed)} of {len(results)} cells done in {options.workdir}"
    say(json.dumps(found) if options.json else done)
    if failed:
        raise lj.RequestError(f"{len(failed)} cells failed: {', '.join(failed)}; see above")
    return 0


def _status(options) -> int:
    from lora_jax.sweeps.status import STATES, seconds_left, sweep_status

    cells = sweep_status(options.workdir)
    left = seconds_left(cells)
    counts = {state: sum(cell.state == state for cell in cells) for state in STATES}
    if options.json:
        rows = [dataclasses.asdict(cell) for cell in cells]
        say(json.dumps({"counts": counts, "seconds_left": left, "cells": rows}))
        return 0
    from rich.console import Console
    from rich.table import Table

    from lora_jax.io.untrusted import printable
    from lora_jax.train.progress import clock_time

    table = Table("cell", "state", box=None, pad_edge=False)
    for heading in ("step", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for cell in cells:
        of = f"/{cell.num_steps}" if cell.num_steps else ""
        loss = "" if cell.loss is None else f"{cell.loss:.4f}"
        row = (cell.name, cell.state, f"{cell.step}{of}", loss, cell.note)
        table.add_row(*(printable(text) for text in row))
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    say(words + (f"; {clock_time(left)} left for those running" if left is not None else ""))
    return 0
