"""Adapters in PEFT's file format: read, written, and their factors as arrays."""

from __future__ import annotations

from lora_jax.peft.factors import Factors as Factors
from lora_jax.peft.factors import read_factors as read_factors
from lora_jax.peft.load import load_adapter as load_adapter
from lora_jax.peft.save import save_adapter as save_adapter
