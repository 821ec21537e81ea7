"""Settings that a config may lack, and what they are then.

A config that does not say them is the same config, with the same hash, as before they existed.
"""

from __future__ import annotations

from typing import Any

# Setting: what it is where a config lacks it, and what `--help` says of it.
_SETTINGS: dict[str, tuple[Any, str]] = {
    "model.quantize": ("", "nf4: a frozen base in four bits"),
    "model.quantize_targets": ("all-linear", "which of its kernels"),
    "model.double_quant": (True, "the scales in eight bits, too"),
    "optimizer.moment_dtype": ("float32", "bfloat16: Adam's moments in half the memory"),
    "optimizer.offload": (False, "Adam's moments in the host's memory (a cell that trains alone)"),
    "train.accumulate_steps": (1, "parts of a batch, one after the other"),
    "train.remat": (
        "",
        "nothing_saveable, dots_saveable, …: layers are computed again in going back",
    ),
    "train.loss_chunk": (0, "positions whose logits are made at once; 0: by size"),
}
OPTIONAL: dict[str, Any] = {key: default for key, (default, _) in _SETTINGS.items()}


def describe_optional() -> str:
    """A line each: the setting with its default, and what it is."""
    said = {key: f"{key}={str(default).lower()}" for key, default in OPTIONAL.items()}
    width = max(map(len, said.values()))
    return "\n".join(f"  {said[key]:{width}}  {about}" for key, (_, about) in _SETTINGS.items())
