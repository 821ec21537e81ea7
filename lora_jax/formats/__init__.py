"""Files: safetensors, GGUF, PEFT's adapters, and whatever appears whole or not at all."""

from __future__ import annotations

import importlib


def __getattr__(name: str):
    # `peft` knows models, and models read files: imported when it is asked for.
    if name == "peft":
        return importlib.import_module("lora_jax.formats.peft")
    raise AttributeError(f"module 'lora_jax.formats' has no attribute {name!r}")
