"""Files: written whole or not at all, and those of strangers read with checks."""

from __future__ import annotations

from lora_jax.io.atomic import atomic_path as atomic_path
from lora_jax.io.atomic import write_json as write_json
from lora_jax.io.atomic import write_text as write_text
