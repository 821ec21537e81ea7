"""The old place of `lora_jax.methods.starts`, for one release."""

import warnings
from typing import Any

from lora_jax.methods import starts


def __getattr__(name: str) -> Any:
    found = getattr(starts, name)
    warnings.warn(
        f"lora_jax.methods.singular.{name} is now in lora_jax.methods.starts",
        DeprecationWarning,
        stacklevel=2,
    )
    return found
