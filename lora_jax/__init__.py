"""A laboratory for low-rank adaptation in JAX: adapters on any parameter of any JAX model.

`lora_jax.__all__` is the public contract; `lora_jax/README.md` is the architecture on one page.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_jax import analysis as analysis
    from lora_jax import data as data
    from lora_jax import hub as hub
    from lora_jax import io as io
    from lora_jax import methods as methods
    from lora_jax import models as models
    from lora_jax import parallel as parallel
    from lora_jax import peft as peft
    from lora_jax import quant as quant
    from lora_jax import settings as settings
    from lora_jax import trackers as trackers
    from lora_jax.core.apply import lora_apply as lora_apply
    from lora_jax.core.axes import KernelAxes as KernelAxes
    from lora_jax.core.axes import kernel_axes as kernel_axes
    from lora_jax.core.errors import RequestError as RequestError
    from lora_jax.core.lift import MaterialisedWarning as MaterialisedWarning
    from lora_jax.core.lift import lift as lift
    from lora_jax.core.lift import watch_materialised as watch_materialised
    from lora_jax.generate.settings import Decoding as Decoding
    from lora_jax.generate.text import generate_text
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
    from lora_jax.models import Model as Model
    from lora_jax.models import load_model as load_model
    from lora_jax.models import save_model as save_model
    from lora_jax.peft.save import save_adapter as save_adapter
    from lora_jax.quant import merge_and_requantize as merge_and_requantize
    from lora_jax.quant import quantize as quantize
    from lora_jax.serve.adapters import Adapted as Adapted
    from lora_jax.serve.adapters import load_adapter as load_adapter
    from lora_jax.serve.predict import Predictions as Predictions
    from lora_jax.serve.predict import predict as predict
    from lora_jax.sweeps.api import sweep as sweep
    from lora_jax.train.run import train as train

    generate = generate_text
else:
    # Hidden from type checkers, to which it would say that every name exists. Nothing is imported
    # before it is used: JAX takes half a second, Flax and Orbax a second more.
    from lora_jax._public import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "core.apply": "lora_apply",
            "core.axes": "KernelAxes kernel_axes",
            "core.errors": "RequestError",
            "core.lift": "MaterialisedWarning lift watch_materialised",
            "generate.settings": "Decoding",
            "methods": "BitFit Combined DoRA FullFineTuning HeadOnly IntrinsicDimension LoRA "
            "LoRAFA LoRAPlus LoRAXS Method PiSSA RsLoRA Rule UniLoRA VeRA arithmetic bind_all "
            "merge_all",
            "methods.masked": "masked_optimizer",
            "methods.registry": "register_method",
            "models": "Model load_model save_model",
            "quant": "merge_and_requantize quantize",
            "peft.save": "save_adapter",
            "serve.adapters": "Adapted load_adapter",
            "serve.predict": "Predictions predict",
            "sweeps.api": "sweep",
        },
        # `train` and `generate` are folders, and called they are their functions (`call_as`).
        submodules="analysis data generate hub io methods models parallel peft quant settings "
        "trackers train",
    )
