"""`lora-jax verify`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import lora_jax as lj
from lora_jax.cli.parser import Parser, say

EXAMPLES = """\
Examples:
  lora-jax verify runs/demo/cells/lora-qv-r8           trains its pack again, compares every bit
  lora-jax verify runs/demo/cells/lora-qv-r8 --alone   trains this cell alone, compares the losses

The same kind of device with the same versions gives the same bits: weights, predictions, metrics.
Where something is different (it says what), and for a packed cell alone, the validation and test
losses must agree within --tolerance. Exit codes: 0 it holds; 1 it differs; 2 it could not be done.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("verify", epilog=EXAMPLES)
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME, or a kept copy of it")
    parser.add_argument("--alone", action="store_true", help="without the other cells of its pack")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of a loss, in nats, where bits need not agree (default: 0.01)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)
    if options.tolerance is not None and not options.tolerance >= 0:
        raise lj.RequestError(f"--tolerance is {options.tolerance}; it must be at least 0")

    from lora_jax.io.paths import cell_of
    from lora_jax.sweeps.verify import TOLERANCE, verify

    verdicts = verify(
        cell_of(options.cell, having="card.json"),
        alone=options.alone,
        tolerance=TOLERANCE if options.tolerance is None else options.tolerance,
        progress=not options.no_progress,
    )
    same = all(verdict.same for verdict in verdicts)
    if options.json:
        rows = [dataclasses.asdict(verdict) for verdict in verdicts]
        say(json.dumps({"same": same, "cells": rows}))
        return 0 if same else 1
    for condition in verdicts[0].conditions:
        say(f"not as it was: {condition}")
    for verdict in verdicts:
        say(_line(verdict))
    return 0 if same else 1


def _line(verdict) -> str:
    of_losses = ", ".join(f"{k} {v:.2g}" for k, v in verdict.loss_differences.items())
    if verdict.same and not verdict.differences:
        return f"{verdict.cell}: the same, bit for bit"
    if verdict.same:
        return f"{verdict.cell}: within {verdict.tolerance:g} nats; losses differ by {of_losses}"
    what = "; ".join(verdict.differences) if verdict.exact else f"losses differ by {of_losses}"
    return f"{verdict.cell}: DIFFERS: {what}"
