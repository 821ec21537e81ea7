"""LoRA-FA: a random `a` that stays as it is, and a trained `b`.

Sources: Zhang et al. 2023, arXiv:2308.03303 (LoRA-FA: nothing of the input needs keeping for a's
gradient, only x @ a); Zhu et al. 2024, arXiv:2402.16842 ("Asymmetry in Low-Rank Adapters": a random
orthonormal `a` does about as well as a trained one, with half of the parameters), which is
`init="orthogonal"`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lora_jax.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, init=False)
class LoRAFA(LoRA):
    """LoRA whose `a` never trains: ΔW = (alpha / rank) · a @ b, the trained parameters r · out.

    `a` is part of `trainable` and of the adapter's file, as `init` drew it; no gradient of it is
    computed. Give your optimizer as `method.optimizer(tx)`, which leaves it alone.
    """

    TITLE: ClassVar = "LoRA-FA"
    FROZEN_PARTS: ClassVar = frozenset({"a"})
