"""Adapters in PEFT's file format: read, written, and their factors as arrays."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.peft.factors import Factors as Factors
    from lora_jax.peft.factors import read_factors as read_factors
    from lora_jax.peft.kohya import read_kohya as read_kohya
    from lora_jax.peft.load import load_adapter as load_adapter
    from lora_jax.peft.save import save_adapter as save_adapter
else:
    # Factors are read without JAX.
    from lora_jax._public import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "factors": "Factors read_factors",
            "kohya": "read_kohya",
            "load": "load_adapter",
            "save": "save_adapter",
        },
    )
