"""Methods: one file each, all through one contract (`base.Method`)."""

from lora_jax.core.rules import Rule as Rule
from lora_jax.methods.base import Method as Method
from lora_jax.methods.full import BitFit as BitFit
from lora_jax.methods.full import FullFineTuning as FullFineTuning
from lora_jax.methods.full import HeadOnly as HeadOnly
from lora_jax.methods.lora import LoRA as LoRA
