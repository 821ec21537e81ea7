"""Runs a sweep of configs (a JSON file) with trackers, in a process that tests may kill."""

import json
import sys

from lora_jax.settings import Settings
from lora_jax.sweeps import Cell, Sweep, run_sweep
from lora_jax.trackers import make_tracker


def main(path: str, workdir: str, *names: str) -> None:
    with open(path, encoding="utf-8") as file:
        configs = json.load(file)
    cells = [Cell(name, Settings.from_config(c)) for name, c in configs.items()]
    trackers = [make_tracker(name) for name in names]
    run_sweep(Sweep("test", tuple(cells)), workdir, progress=False, trackers=trackers)


if __name__ == "__main__":
    main(*sys.argv[1:])
