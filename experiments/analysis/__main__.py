"""Tables, figures and verdicts of a finished sweep, and the pages made from all of them.

python -m experiments.analysis what_rank runs/what_rank
python -m experiments.analysis index       # experiments/README.md and the table of settings
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.analysis import forgotten, study
from experiments.analysis.findings import RESULTS
from experiments.analysis.index import ORDER, write_pages
from lora_jax import RequestError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one analysis; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", choices=["index", *ORDER], metavar="NAME", help=", ".join(["index", *ORDER])
    )
    parser.add_argument(
        "workdir",
        nargs="?",
        type=Path,
        help="a finished sweep's --workdir; second editions make their page without it, from "
        "the files that are committed",
    )
    parser.add_argument("--out", type=Path, help="(default: experiments/results/NAME)")
    parser.add_argument(
        "--beside", type=Path, help="a sweep, or results kept of one, that NAME compares with"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="intrinsic_digits: few dimensions and steps; not kept"
    )
    options = parser.parse_args(argv)
    if options.name == "index":
        write_pages()
        return 0
    module = importlib.import_module(f"experiments.analysis.{options.name}")
    options.out = options.out or RESULTS / options.name
    options.beside = options.beside or RESULTS / getattr(module, "BESIDE", "")
    if not hasattr(module, "write") or (hasattr(module, "page") and options.workdir is None):
        return _write_page(parser, module, options)
    takes = inspect.signature(module.write).parameters
    if "workdir" in takes and options.workdir is None:
        parser.error(f"{options.name} needs the workdir of a finished sweep")
    try:
        module.write(*(getattr(options, name) for name in takes))
    except RequestError as error:
        parser.exit(2, f"{parser.prog} {options.name}: {error}\n")
    return 0


def _write_page(parser, module, options) -> int:
    """Collects the finished runs, if any are given, and makes the page from the record."""
    try:
        if options.workdir is not None:
            study.collect([options.workdir], options.out)
            forgotten.collect(options.workdir, options.out)
        module.page(options.out)
    except RequestError as error:
        parser.exit(2, f"{parser.prog} {options.name}: {error}\n")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
