"""Trains a config (a JSON file) into a workdir, in a process of its own that tests may kill."""

import json
import sys

from lora_jax.train.run import train


def main(config_path: str, workdir: str) -> None:
    with open(config_path, encoding="utf-8") as file:
        config = json.load(file)
    train(config, workdir, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
