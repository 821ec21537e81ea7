"""A frozen base in fewer bits: a value in the params tree that dequantises where it is used."""

from lora_jax.quant import nf4 as nf4
from lora_jax.quant.quantize import Requantized as Requantized
from lora_jax.quant.quantize import SkippedWarning as SkippedWarning
from lora_jax.quant.quantize import bits_per_param as bits_per_param
from lora_jax.quant.quantize import dequantize as dequantize
from lora_jax.quant.quantize import merge_and_requantize as merge_and_requantize
from lora_jax.quant.quantize import merge_error as merge_error
from lora_jax.quant.quantize import quantize as quantize
from lora_jax.quant.weight import NF4Weight as NF4Weight
