"""Methods: one file each, all through one contract (`base.Method`)."""

from lora_jax.core.rules import Rule as Rule
from lora_jax.methods.base import Method as Method
from lora_jax.methods.combined import Combined as Combined
from lora_jax.methods.combined import bind_all as bind_all
from lora_jax.methods.combined import merge_all as merge_all
from lora_jax.methods.dora import DoRA as DoRA
from lora_jax.methods.full import BitFit as BitFit
from lora_jax.methods.full import FullFineTuning as FullFineTuning
from lora_jax.methods.full import HeadOnly as HeadOnly
from lora_jax.methods.intrinsic import IntrinsicDimension as IntrinsicDimension
from lora_jax.methods.lora import LoRA as LoRA
from lora_jax.methods.lora_fa import LoRAFA as LoRAFA
from lora_jax.methods.lora_plus import LoRAPlus as LoRAPlus
from lora_jax.methods.lora_xs import LoRAXS as LoRAXS
from lora_jax.methods.pissa import PiSSA as PiSSA
from lora_jax.methods.rslora import RsLoRA as RsLoRA
from lora_jax.methods.uni_lora import UniLoRA as UniLoRA
from lora_jax.methods.vera import VeRA as VeRA
