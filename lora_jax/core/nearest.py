"""The known names nearest to one that is not known, for the ends of error messages."""

from __future__ import annotations

import difflib
from typing import Any

# What other libraries call a setting, and what it is called here.
PEFT_WORDS = {
    "learning_rate": "lr", "max_steps": "num_steps", "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size", "modules_to_save": "train",
    "target_modules": "targets", "layers_pattern": "targets", "layers_to_transform": "layers",
    "exclude_modules": "exclude", "r": "rank", "lora_rank": "rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "rank_pattern": "rules", "alpha_pattern": "rules",
    "init_lora_weights": "init", "loraplus_lr_ratio": "ratio",
}  # fmt: skip


def nearest(name: str, known, *, count: int = 4) -> str:
    """The tail of an error message: the known names nearest to `name`, or all if there are few."""
    name = str(name)
    meant = PEFT_WORDS.get(name.rpartition(".")[2])

    def distance(candidate: Any) -> tuple[bool, float, Any]:
        is_other = meant is None or str(candidate).rpartition(".")[2] != meant
        ratio = difflib.SequenceMatcher(None, name, candidate, autojunk=False).ratio()
        return is_other, -ratio, candidate

    near = [repr(candidate) for candidate in sorted(known, key=distance)[:count]]
    return "nearest: " + ", ".join(near) if near else "there are none"
