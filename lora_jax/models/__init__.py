"""Models without a word of adaptation in them, loaded from Hugging Face folders."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.models.functional import flatten as flatten
    from lora_jax.models.load import load_model as load_model
    from lora_jax.models.model import Model as Model
    from lora_jax.models.save import save_model as save_model
else:
    # Files of this folder that need NumPy alone are imported without JAX and Flax.
    from lora_jax._public import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {"functional": "flatten", "load": "load_model", "model": "Model", "save": "save_model"},
    )
