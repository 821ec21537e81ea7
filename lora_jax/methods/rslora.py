"""rsLoRA: LoRA with the scale that keeps its learning alike at every rank.

Source: Kalajdzievski 2023, arXiv:2312.03732, Theorem 3.2: only scales that go with 1/√r keep the
adapter's outputs and gradients of one size as r grows; α/r makes both vanish.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lora_jax.core.apply import scale_of
from lora_jax.core.rules import Rule
from lora_jax.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, init=False)
class RsLoRA(LoRA):
    """ΔW = (alpha / √rank) · a @ b; all else is LoRA.

    >>> RsLoRA(targets="q", rank=4, alpha=4).scale(Rule("q", rank=4, alpha=4))
    2.0
    """

    TITLE: ClassVar = "rsLoRA"

    def scale(self, rule: Rule) -> float:
        return scale_of(rule.alpha, rule.rank, stabilised=True)
