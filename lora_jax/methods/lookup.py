"""LoRA on the lookups of a table alone: what PEFT's adapter of a tied embedding is."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.core.lookups import LookupWeight
from lora_jax.core.values import AdaptedValue
from lora_jax.core.weights import LoRAWeight
from lora_jax.methods.lora import LoRA
from lora_jax.methods.sites import Site


@dataclasses.dataclass(frozen=True, init=False)
class LookupLoRA(LoRA):
    """LoRA whose ΔW is added where the parameter is looked up, and nowhere else.

    In PEFT an adapter belongs to a module, so one on a tied model's embedding leaves its head as it
    was; `LoRA` here belongs to the parameter and changes both. `merge` raises `RequestError`: no
    one array is both.
    """

    def weight(self, low_rank: LoRAWeight, parts: Any, site: Site) -> AdaptedValue:
        fields = dataclasses.fields(low_rank)
        return LookupWeight(**{field.name: getattr(low_rank, field.name) for field in fields})
