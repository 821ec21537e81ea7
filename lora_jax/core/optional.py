"""Settings that a config may lack: what they are then, and how one is put in from outside.

A config that does not say them is the same config, with the same hash, as before they existed.
"""

from __future__ import annotations

from typing import Any

from lora_jax.core.errors import RequestError

# Setting: what it is where a config lacks it.
OPTIONAL: dict[str, Any] = {
    "model.quantize": "",  # or "nf4": a frozen base in four bits
    "model.quantize_targets": "all-linear",
    "model.double_quant": True,
    "optimizer.moment_dtype": "float32",  # or "bfloat16": Adam's moments, see `make_optimizer`
    "optimizer.offload": False,  # Adam's moments in the host's memory, of a cell that trains alone
    "train.accumulate_steps": 1,  # parts of a batch, one after the other
    "train.remat": "",  # what layers keep for the backward pass: a name of jax.checkpoint_policies
    "train.loss_chunk": 0,  # positions whose logits a language model makes at once; 0: by size
}


def set_optional(config: Any, key: str, value: Any) -> None:
    """Puts an optional setting into a locked `ConfigDict` that lacks it; "true" as text, too.

    Raises `RequestError` for a value of another type.
    """
    default = OPTIONAL[key]
    if isinstance(default, bool) and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    elif isinstance(default, int) and isinstance(value, str) and value.lstrip("-").isdecimal():
        value = int(value)
    if type(value) is not type(default):
        kind = type(default).__name__
        raise RequestError(f"{key}={value!r} is no {kind}; without it, it is {default!r}")
    section, _, name = key.partition(".")
    with config.unlocked():
        config[section][name] = value
