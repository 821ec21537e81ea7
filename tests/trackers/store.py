"""A tracker of three functions, whose store outlives the processes that fill it, and what the
store must hold in the end."""

from __future__ import annotations

import dataclasses
import json

from lora_jax.train.record import Card
from lora_jax.train.tracking import summary_of


@dataclasses.dataclass
class Run:
    name: str
    group: str
    settings: dict
    rows: list = dataclasses.field(default_factory=list)
    summaries: list = dataclasses.field(default_factory=list)


class Store:
    """Runs by their ids."""

    def __init__(self):
        self.runs: dict[str, Run] = {}

    def start(self, name, group, settings, run_id):
        self.run = self.runs.setdefault(run_id, Run(name, group, dict(settings)))
        return max((step for step, _ in self.run.rows), default=None)

    def log(self, step, numbers):
        self.run.rows.append((step, dict(numbers)))

    def finish(self, summary):
        self.run.summaries.append(dict(summary))

    def named(self, name):
        (found,) = (run for run in self.runs.values() if run.name == name)
        return found


def expected_rows(cell):
    """What a tracker must hold of a finished cell, from its metrics.jsonl and card.json alone."""
    steps: dict[int, dict[str, float]] = {}
    for line in (cell / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step, split = row.pop("step"), row.pop("split")
        if split != "test":
            own = {f"{split}/{name}": x for name, x in row.items() if x is not None}
            steps.setdefault(step, {}).update(own)
    card = json.loads((cell / "card.json").read_text())["metrics"]
    best, test = card["validation"], card["test"]
    last = {"best/step": best["best_step"], "train/loss": card["train"]["loss"]}
    last |= {f"best/{name}": best[name] for name in ("loss", "accuracy")}
    last |= {f"test/{name}": x for name, x in test.items()}
    last |= {name: card[name] for name in ("steps", "adapter_bytes")}
    steps[max(steps)].update(last)
    return sorted(steps.items())


def summary_of_cell(cell):
    return summary_of(Card.read(cell / "card.json"))


TIMES = ("seconds", "per_s")


def without_times(rows):
    """Rows without what tells the time, which two runs of one step need not share."""
    return [
        (step, {name: x for name, x in row.items() if not name.endswith(TIMES)})
        for step, row in rows
    ]
