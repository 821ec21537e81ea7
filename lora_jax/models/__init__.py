"""Models without a word of adaptation in them, loaded from Hugging Face folders."""

from lora_jax.models.functional import flatten
from lora_jax.models.load import load_model
from lora_jax.models.model import Model
from lora_jax.models.save import save_model

__all__ = ["Model", "flatten", "load_model", "save_model"]
