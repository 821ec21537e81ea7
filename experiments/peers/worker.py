"""One tool's column: `python -m experiments.peers.worker FILE [CASE …]` prints a JSON line a cell.

`FILE` is the tool's file here without ".py". Run with the tool's own Python; the command,
`experiments.attachment`, starts it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import platform
import sys

import jax

from experiments.peers.cases import CASES, Case
from experiments.peers.judge import VERDICTS, Outcome, judge


def main(arguments: list[str]) -> None:
    for record in column(arguments[0], arguments[1:] or list(CASES)):
        print(json.dumps(record), flush=True)


def column(file: str, names: list[str]):
    """A record of the tool, then one of each cell as it is done; float64 is switched on."""
    jax.config.update("jax_enable_x64", True)
    tool = importlib.import_module(f"experiments.peers.{file}")
    logging.disable(logging.WARNING)  # Orbax and others tell of themselves
    yield {"tool": tool.NAME, "versions": versions(tool.PACKAGES)}
    for name in names:
        outcomes = outcomes_of(tool, CASES[name])
        tried = [dataclasses.asdict(outcome) for outcome in outcomes]
        yield {"case": name, **dataclasses.asdict(best_of(outcomes)), "tried": tried}


def outcomes_of(tool, case: Case) -> list[Outcome]:
    """Each way of writing the cell until one is low-rank, the model as it is and nothing to note.

    In float64; where that only raises, the best way once more in float32.
    """
    outcomes: list[Outcome] = []
    ways = {}
    for way in tool.ways(case):
        outcomes.append(judge(case, way, case.dtype))
        ways[way.name] = way
        if _rank(outcomes[-1]) == (0, False, False):
            return outcomes
    best = best_of(outcomes)
    if best.verdict == "error" and case.dtype == "float64":
        outcomes.insert(0, judge(case, ways[best.way], "float32"))
    return outcomes


def best_of(outcomes: list[Outcome]) -> Outcome:
    """The tool's best: of equals the last, where the tool was given most help."""
    return min(reversed(outcomes), key=_rank)


def _rank(outcome: Outcome) -> tuple[int, bool, bool]:
    noted = outcome.verdict == "low-rank" and bool(outcome.message)
    return VERDICTS.index(outcome.verdict), noted, outcome.rewritten


def versions(packages) -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in packages}
    return found | {"python": platform.python_version(), "devices": str(len(jax.devices()))}


if __name__ == "__main__":
    main(sys.argv[1:])
