"""Files: safetensors, GGUF, PEFT's adapters, and whatever appears whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.peft import load as peft
    from lora_jax.io.atomic import atomic_path as atomic_path
    from lora_jax.io.atomic import write_json as write_json
    from lora_jax.io.atomic import write_text as write_text
    from lora_jax.peft.factors import Factors as Factors
    from lora_jax.peft.factors import read_factors as read_factors
else:
    # PEFT's files know models, and models read files: imported when they are asked for.
    from lora_jax._public import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {"atomic": "atomic_path write_json write_text", "peft_factors": "Factors read_factors"},
        submodules="peft",
    )
