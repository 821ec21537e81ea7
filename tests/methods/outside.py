"""Variants outside the package that are no sum of low-rank products: a gain, and a bottleneck."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.core.labelled_dot import contract
from lora_jax.core.uses import DotUse
from lora_jax.core.values import RANK, AdaptedValue, use_beneath


@dataclasses.dataclass(frozen=True)
class Gained(lj.LoRA):
    """ΔW = (alpha / rank) · gain · a @ b; `gain` is one number per adapter, stacked or not."""

    start: float = 0.5

    TITLE: ClassVar = "LoRA with a gain"
    PARTS: ClassVar = {"a": "sir", "b": "sro", "gain": ""}
    DECAY_MULTIPLIERS: ClassVar = {"gain": 0.0}

    def init_parts(self, key, kernel, site):
        parts = super().init_parts(key, kernel, site)
        return {**parts, "gain": jnp.full(site.part_shape(""), self.start, parts["a"].dtype)}

    def factors(self, parts, site):
        return parts["gain"] * parts["a"], parts["b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckWeight(AdaptedValue):
    """`x @ kernel + scale · relu(x @ a) @ b` wherever the kernel meets x in a product."""

    a: Any
    b: Any
    scale: Any

    SIDES: ClassVar = {"a": "sir", "b": "sro", "scale": "s"}

    def use(self, use):
        is_product = isinstance(use, DotUse)
        if not is_product or {self.current_roles[axis] for axis in use.contracted} != {"i"}:
            return None
        frozen, out = use_beneath(self.kernel, use), use.out_axes
        hidden_axes = [*(axis for axis in out if axis not in self.axes("o")), RANK]
        hidden = contract(use.other, use.other_axes, self.a, self.side_axes("a"), hidden_axes)
        hidden = jax.nn.relu(hidden)
        change = contract(hidden, hidden_axes, self.b, self.side_axes("b"), out)
        return frozen + self.scale * change


@dataclasses.dataclass(frozen=True)
class Bottleneck(lj.LoRA):
    """The parallel adapter (He et al. 2022, arXiv:2110.04366, Table 1), on kernels of products."""

    TITLE: ClassVar = "bottleneck adapter"
    MERGES: ClassVar = False
    UNSUPPORTED_SETTINGS: ClassVar = {"dropout": "it has none before its nonlinearity"}

    def weight(self, low_rank, parts, site):
        names = ("kernel", "a", "b", "scale", "roles", "path")
        return BottleneckWeight(**{name: getattr(low_rank, name) for name in names})
