r"""Where adapters can be attached: constructs of JAX models × tools, each cell by running it.

    make attachment      or      python -m experiments.attachment \
        --peers=.venv-peers/bin/python --out=experiments/results/attachment

A construct is a small model of which the kernels get adapters of rank 2: products, lookups,
convolutions, experts, loops, JAX's transformations inside the model, and what Flax NNX, Flax Linen
and Equinox add. Each tool adapts it in the way its documentation shows, in several ways where there
are several, and the best counts. The oracle is W' = W + scale · A·B in float64 and the plain model;
outputs and the gradients of A and B are compared under jit, at random non-zero A and B, to 1e-9 of
the largest entry (3e-2 in bfloat16). A cell says

    low-rank         equal to the oracle, and no ΔW or W + ΔW is formed: no value of the forward
                     pass's jaxpr depends on both A and B but not on the input
    materialised     equal to the oracle, but ΔW or W + ΔW is formed
    error            it raises
    silently wrong   it runs without a warning, and differs from the oracle, or a kernel that the
                     rule names has no adapter
    not expressible  the tool has no way to attach there

Our column runs in this process; each other tool in one of its own, with the Python of --peers
(`make .venv-peers/ready`, from experiments/peers/requirements.txt); a cell that kills its process
is an error, and the rest goes on. All of it takes about ten minutes on one core. Exit code 1 says
that a cell of ours is an error or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# One file in experiments/peers a tool; ours first.
OURS, PEERS = "ours", ("of_qwix", "of_nnx", "of_quax")
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    from experiments.peers.cases import CASES
    from experiments.peers.table import markdown
    from experiments.peers.worker import column

    names = options.only or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        _parser().error(f"--only={unknown[0]}: no such case; there are {', '.join(CASES)}")
    if options.peers and not Path(options.peers).is_file():
        _parser().error(f"--peers={options.peers} is no file; run `make .venv-peers/ready` first")
    columns = [_gathered(column(OURS, names))]
    for file in PEERS if options.peers else ():
        records = _column_of_peer(options.peers, file, names, options.seconds)
        columns.append(_gathered(records))
    record = {
        "command": "python -m experiments.attachment " + " ".join(arguments or sys.argv[1:]),
        "commit": _commit(),
        "columns": columns,
    }
    page = markdown(record, [CASES[name] for name in names])
    print("\n" + page)
    if options.out and not options.only:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "attachment.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        _write(folder / "attachment.md", page)
    ours = columns[0]["cells"].values()
    return int(any(cell["verdict"] in ("error", "silently wrong") for cell in ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.attachment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", help="folder of attachment.json and attachment.md")
    parser.add_argument("--peers", help="a Python with qwix, quax, flax; without it, ours alone")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this case (again for more); writes nothing"
    )
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="limit for one cell of a peer (default: 300)"
    )
    return parser


def _gathered(records: Iterator[dict]) -> dict:
    """A column from its records, each said as it comes."""
    head = next(records)
    print(f"{head['tool']} {head['versions']}", flush=True)
    cells = {}
    for record in records:
        name = record.pop("case")
        cells[name] = record
        print(f"  {name:28} {record['verdict']:15} {record['message'][:100]}", flush=True)
    return {**head, "cells": cells}


def _column_of_peer(python: str, file: str, names: list[str], seconds: float) -> Iterator[dict]:
    """The records of a peer's process, begun anew behind a cell that ended it."""
    left, told = list(names), False
    while left:
        for record in _records(python, file, left, seconds):
            if "case" in record:
                left.remove(record["case"])
                yield record
            elif "tool" in record and not told:
                told = True
                yield record
            elif "ended" in record and not told:
                raise SystemExit(f"{python} does not run experiments/peers/{file}.py; see above")
            elif "ended" in record and left:
                yield _cell_that_ended_it(left.pop(0), record["ended"])


def _records(python: str, file: str, names: list[str], seconds: float) -> Iterator[dict]:
    """What one process says, a line a record, and at last how it ended."""
    process = subprocess.Popen(
        [python, "-m", "experiments.peers.worker", file, *names],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
    )
    late = threading.Event()

    def stop():
        late.set()
        process.kill()

    def watch():
        timer = threading.Timer(seconds, stop)
        timer.start()
        return timer

    timer = watch()
    for line in process.stdout:
        timer.cancel()
        yield json.loads(line)
        timer = watch()
    timer.cancel()
    code = process.wait()
    reason = f"it took over {seconds:g} s" if late.is_set() else f"its process ended with {code}"
    yield {"ended": reason}


def _cell_that_ended_it(name: str, reason: str) -> dict:
    cell = {"verdict": "error", "message": reason, "difference": None, "formed": [], "way": ""}
    return {"case": name, **cell, "rewritten": False, "dtype": "", "warned": [], "tried": [cell]}


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip()


def _write(path: Path, text: str) -> None:
    """All of the file or nothing of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
