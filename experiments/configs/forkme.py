"""A config to copy: one line here on what you compare, and why.

    lora-jax init mine.py       # writes this file
    lora-jax train --config=mine.py --workdir=runs/mine
    lora-jax sweep --config=mine.py --sweep=rank --workdir=runs/mine_by_rank

A config says only what it changes. `lora-jax train --help` lists all settings and their defaults,
lora_jax/settings/README.md their ranges too. Any of them is a flag: --config.method.rank=4.
The argument is a size: `mine.py:smoke` is a tiny model for four steps, a minute on one core.
"""

from ml_collections import ConfigDict

from lora_jax.settings import make_config

SIZES = {
    "": {},
    "smoke": {"model.name": "tiny-bert", "data.limit": 64, "train.num_steps": 4},
}


def sweep_rank(add):
    """Ranks at three learning rates each; the best on validation runs with two more seeds."""
    for rank in (1, 8):
        add(
            f"r{rank}",
            tune=("optimizer.lr", (3e-4, 1e-3, 3e-3)),
            more_seeds=(1, 2),
            **{"method.rank": rank},
        )


def get_config(size: str = "") -> ConfigDict:
    """The config at a size: the whole one, or "smoke"."""
    changes = {
        "model.name": "minilm",  # or a folder of Hugging Face's layout
        "model.num_labels": 2,
        "data.source": "reviews",  # or jsonl, csv, tsv, parquet, with data.path
        "data.max_length": 32,
        "method.name": "lora",  # or full, head, dora, vera, …
        "method.targets": "q,v",  # or all-linear, or a regular expression over paths
        "method.rank": 8,
        "optimizer.lr": 1e-3,
        "train.num_epochs": 1.0,
    }
    return make_config(changes, SIZES[size])
