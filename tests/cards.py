"""A whole card, as JSON, for tests to change."""

from __future__ import annotations

import copy
from typing import Any

from lora_jax.settings import config_hash

_CONFIG = {
    "seed": 0,
    "model": {"name": "tiny-bert"},
    "data": {"seed": 0},
    "method": {"name": "lora"},
    "optimizer": {"lr": 1e-3},
}
_CARD = {
    "config": _CONFIG,
    "config_hash": config_hash(_CONFIG),
    "base_hash": "b" * 64,
    "data_hash": "d" * 64,
    "seeds": {"data": 0, "seed": 0},
    "device": {"platform": "cpu", "kind": "cpu", "count": 1, "threads": 2, "machine": "x86_64"},
    "program": {
        "K": 1, "slot": 0, "ranks": [8], "targets": ["w"], "batch_shapes": [[8, 16]], "threads": 2,
        "xla_flags": "", "matmul_precision": "None",
    },
    "counts": {"adapter": 7, "head": 1, "total": 8},
    "seconds": {"total": 41.0, "per_step": 0.11, "compile": 6.5},
    "metrics": {
        "train": {"loss": 0.4},
        "validation": {"loss": 0.5, "accuracy": 0.7, "best_step": 3},
        "test": {"loss": 0.5, "accuracy": 0.5, "n": 4},
        "stopped": "ended",
        "steps": 4,
        "adapter_bytes": 900,
    },
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "commit": "c" * 40,
}  # fmt: skip


def card_json(changes: dict[str, Any] | None = None, **replaced: Any) -> dict[str, Any]:
    """A card of one run; `changes` by dotted name, `replaced` of the outermost keys."""
    card = {**copy.deepcopy(_CARD), **replaced}
    for name, value in (changes or {}).items():
        *holders, last = name.split(".")
        place = card
        for holder in holders:
            place = place[holder]
        place[last] = value
    return card
