"""Runs a sweep of configs (a JSON file) in a process of its own that tests may kill."""

import json
import sys

from lora_jax.settings import Settings
from lora_jax.sweeps import Cell, Sweep, run_sweep


def main(path: str, workdir: str) -> None:
    with open(path, encoding="utf-8") as file:
        configs = json.load(file)
    cells = [Cell(name, Settings.from_config(c)) for name, c in configs.items()]
    run_sweep(Sweep("test", tuple(cells)), workdir, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
