"""Makes a study's page again from its committed files, and says whether it is the same.

    python -m experiments.recompute what_rank_2      # one study
    python -m experiments.recompute                  # all of the second edition

Reads results/NAME (cells.jsonl, tuned.json, predictions.npz), needs no run and no model. Every
interval and verdict is computed anew. Exit code 0: the page equals the committed one; 1: it
differs, and the lines that do are printed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analysis.findings import RESULTS
from lora_jax import RequestError
from lora_jax.core.nearest import nearest

# A library's rounding may differ between versions by this much, relative.
ROUNDING = 1e-6


def studies() -> list[str]:
    """The names of the experiments whose pages are made from committed files."""
    there = sorted(path.parent.name for path in RESULTS.glob("*/verdicts.json"))
    place = Path(__file__).parent / "analysis"
    sources = {name: place / f"{name}.py" for name in there}
    return [n for n, at in sources.items() if at.exists() and "\ndef page(" in at.read_text()]


def recompute(name: str, folder: Path | None = None) -> list[str]:
    """What differs between the committed page of a study and one made anew; [] if nothing does."""
    folder = folder or RESULTS / name
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / name
        # Figures are drawn anew; all else that is not made here is read.
        shutil.copytree(
            folder, out, ignore=shutil.ignore_patterns("*.png", "README.md", "verdicts.json")
        )
        module = importlib.import_module(f"experiments.analysis.{name}")
        module.page(out)
        found = [
            f"verdicts.json: {line}"
            for line in _unequal(
                *(json.loads((one / "verdicts.json").read_text()) for one in (folder, out))
            )
        ]
        pages = [(one / "README.md").read_text().splitlines() for one in (folder, out)]
        lines = difflib.unified_diff(*pages, "committed", "recomputed", lineterm="", n=0)
        return found + list(lines)


def _unequal(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two JSON values differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in _unequal(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for n, pair in pairs for line in _unequal(*pair, f"{path}/{n}")]
    if isinstance(one, float) and isinstance(other, float):
        same = math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-9)
        same = same or (math.isnan(one) and math.isnan(other))
    else:
        same = one == other
    return [] if same else [f"{path}: committed {one!r}, recomputed {other!r}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Recomputes; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.recompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(studies()) or "none yet")
    names = parser.parse_args(argv).names or studies()
    if unknown := [name for name in names if name not in studies()]:
        near = nearest(unknown[0], studies())
        parser.error(f"{unknown[0]} has no page that can be recomputed; {near}")
    differ = False
    for name in names:
        try:
            found = recompute(name)
        except RequestError as error:
            found = [str(error)]
        print(f"{name}: {'differs' if found else 'the same'}", *found, sep="\n  ")
        differ = differ or bool(found)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
