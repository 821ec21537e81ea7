"""`lora-jax sweep`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

from lora_jax.cli.requests import OVERRIDES, Parser, add_json, config_file, needs_config, say
from lora_jax.core.errors import RequestError

EXAMPLES = f"""\
{OVERRIDES}; it then holds for every cell that the sweep does not set.

Examples:
  lora-jax sweep --config=experiments/reviews_minilm.py:lora,demo --sweep=demo --workdir=runs/demo
  lora-jax report runs/demo

A sweep is a function in the config's file:
  def sweep_rank(add):
    for rank in (1, 2, 4, 8):
      add(f"r{{rank}}", **{{"method.rank": rank}})

A finished cell is not run again; a stopped one goes on where it was.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "sweep",
        description="Train every cell of a sweep, one after another.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--config", metavar="FILE.py[:arg]", help="the experiment (required)")
    parser.add_argument("--sweep", required=True, help="NAME of a sweep_NAME in that file")
    parser.add_argument("--workdir", required=True, help="folder of the runs")
    parser.add_argument("--only", metavar="TEXT", help="only cells whose name contains TEXT")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    add_json(parser)
    options, config = parser.parse_with_config(argv)
    config = needs_config(config, "sweep")

    from lora_jax.sweeps import read_sweep, run_sweep

    cells = read_sweep(config_file(argv), options.sweep, config)
    if options.only:
        names = [cell.name for cell in cells]
        cells = [cell for cell in cells if options.only in cell.name]
        if not cells:
            raise RequestError(f"no cell's name contains {options.only!r}; there are {names[:8]}")

    def report(number, cell, result):
        if isinstance(result, RequestError):
            text = f"failed: {result}"
        else:
            test, metrics = result["metrics"]["test"], result["metrics"]
            text = (
                f"test loss {test['loss']:.4f}, accuracy {test['accuracy']:.4f}; "
                f"{metrics['steps']} steps, {metrics['stopped']}"
            )
        print(f"[{number + 1}/{len(cells)}] {cell.name}: {text}", file=sys.stderr, flush=True)

    again = shlex.join(["lora-jax", "sweep", *argv])
    results = run_sweep(
        cells,
        options.workdir,
        progress=not options.no_progress,
        command=again,
        on_cell=report,
    )
    failed = [name for name, result in results.items() if isinstance(result, RequestError)]
    if options.json:
        say(json.dumps({name: str(r) if name in failed else r for name, r in results.items()}))
    else:
        say(f"{len(results) - len(failed)} of {len(results)} cells done in {options.workdir}")
    if failed:
        raise RequestError(f"{len(failed)} cells failed: {', '.join(failed)}; see above")
    return 0
