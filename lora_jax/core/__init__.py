"""Pure JAX: parameters by path, the formula, adapted values, and the interpreter for them."""

from lora_jax.core import control as control
from lora_jax.core import primitives as primitives
