"""Cells of tiny-bert on disk, and what must be the same of two workdirs."""

from __future__ import annotations

import json

from lora_jax.sweeps import Cell, Sweep
from tests.train.results import TIMES, digest, results_of

# Mixed targets, ranks, rates, alphas, decays, dropouts and seeds; all in one bucket.
CELLS = {
    "qv-r1": {"method.rank": 1, "seed": 1},
    "qv-r4": {"method.rank": 4, "optimizer.lr": 1e-2, "method.alpha": 4.0},
    "all-r2": {"method.rank": 2, "method.targets": "all-linear", "optimizer.weight_decay": 0.3},
    "up-r8": {"method.targets": "up", "method.dropout": 0.5, "seed": 2},
}


def sweep_of(make_config, changes, cells=CELLS):
    """A sweep of these cells, `changes` in all of them."""
    made = [Cell(name, make_config({**changes, **own})) for name, own in cells.items()]
    return Sweep("test", tuple(made))


def everything(workdir):
    """Of each cell what does not tell the time, and the packs' names."""
    found = {"packs": sorted(path.parent.name for path in workdir.glob("packs/*/pack.json"))}
    for cell in sorted((workdir / "cells").iterdir()):
        if (cell / "checkpoints").exists() or not (cell / "card.json").exists():
            rows = rows_of(cell)
            found[cell.name] = results_of(cell) if (cell / "card.json").exists() else rows
            continue
        card = json.loads((cell / "card.json").read_text())
        kept = ("config_hash", "counts", "metrics", "seeds")
        program = {k: card["program"][k] for k in ("K", "slot", "pack", "cells", "ranks")}
        found[cell.name] = {
            "card": {key: card[key] for key in kept} | program,
            "rows": rows_of(cell),
            "predictions": digest(cell / "test_predictions.npz"),
            "weights": digest(cell / "adapter" / "trainable.safetensors"),
        }
    return found


def rows_of(cell):
    """The cell's metrics without the times, and how it failed."""
    lines = (cell / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    failure = cell / "failure.json"
    return [*rows, *([json.loads(failure.read_text())] if failure.exists() else [])]
