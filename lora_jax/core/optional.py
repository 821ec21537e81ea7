"""Settings that a config may lack: what they are then, and how one is put in from outside.

A config that does not say them is the same config, with the same hash, as before they existed.
"""

from __future__ import annotations

from typing import Any

from lora_jax.core.errors import RequestError

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
