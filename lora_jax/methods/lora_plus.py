"""LoRA+: a higher learning rate for b than for a.

Source: Hayou, Ghosh & Yu 2024, arXiv:2402.12354: with one rate for both, wide networks do not learn
features efficiently; η_b = λ η_a with λ well above 1 does (they recommend λ about 16).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Unpack

from lora_jax.core.errors import RequestError
from lora_jax.methods.lora import LoRA, LoRASettings


@dataclasses.dataclass(frozen=True, init=False)
class LoRAPlus(LoRA):
    """LoRA whose `b` has `ratio` times the learning rate; parameters trained whole have the base
    rate. The rate given to the optimizer is a's.

    >>> LoRAPlus(targets="q", rank=4, ratio=8.0).rate_multipliers
    {'b': 8.0}
    """

    ratio: float = dataclasses.field(default=16.0, metadata={"help": "b's learning rate over a's"})

    TITLE: ClassVar = "LoRA+"

    def __init__(self, *, ratio: float = 16.0, **settings: Unpack[LoRASettings]):
        if not (math.isfinite(ratio) and ratio > 0):
            raise RequestError(f"ratio is {ratio!r}; it must be a positive number, 16 in the paper")
        super().__init__(**settings)
        object.__setattr__(self, "ratio", float(ratio))

    @property
    def rate_multipliers(self) -> Mapping[str, float]:
        return {"b": self.ratio}
