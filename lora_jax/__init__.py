"""A laboratory for low-rank adaptation in JAX: adapters on any parameter of any JAX model.

The names here are the public contract; `lora_jax/README.md` is the architecture on one page.
"""

from lora_jax.core.apply import lora_apply as lora_apply
from lora_jax.core.axes import KernelAxes as KernelAxes
from lora_jax.core.axes import kernel_axes as kernel_axes
from lora_jax.core.errors import RequestError as RequestError
from lora_jax.core.lift import MaterialisedWarning as MaterialisedWarning
from lora_jax.core.lift import lift as lift
from lora_jax.core.lift import watch_materialised as watch_materialised
from lora_jax.methods import BitFit as BitFit
from lora_jax.methods import Combined as Combined
from lora_jax.methods import DoRA as DoRA
from lora_jax.methods import FullFineTuning as FullFineTuning
from lora_jax.methods import HeadOnly as HeadOnly
from lora_jax.methods import IntrinsicDimension as IntrinsicDimension
from lora_jax.methods import LoRA as LoRA
from lora_jax.methods import LoRAFA as LoRAFA
from lora_jax.methods import LoRAPlus as LoRAPlus
from lora_jax.methods import LoRAXS as LoRAXS
from lora_jax.methods import Method as Method
from lora_jax.methods import PiSSA as PiSSA
from lora_jax.methods import RsLoRA as RsLoRA
from lora_jax.methods import Rule as Rule
from lora_jax.methods import UniLoRA as UniLoRA
from lora_jax.methods import VeRA as VeRA
from lora_jax.methods import arithmetic as arithmetic
from lora_jax.methods import bind_all as bind_all
from lora_jax.methods import merge_all as merge_all
from lora_jax.methods.masked import masked_optimizer as masked_optimizer
from lora_jax.methods.registry import register_method as register_method
from lora_jax.quant import merge_and_requantize as merge_and_requantize
from lora_jax.quant import quantize as quantize

__version__ = "0.1.0"


def __getattr__(name: str):
    # Loading models needs Flax and tokenizers; the core must import without waiting for them.
    if name == "load_model":
        from lora_jax.models.load import load_model

        return load_model
    if name == "formats":
        import lora_jax.formats

        return lora_jax.formats
    if name == "analysis":
        import lora_jax.analysis

        return lora_jax.analysis
    if name == "sweep":
        from lora_jax.sweeps.api import sweep

        return sweep
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "analysis", "formats", "load_model", "sweep"})
