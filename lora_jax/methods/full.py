"""Full fine-tuning, BitFit and the frozen-feature probe: methods without adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from lora_jax.methods.base import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Every floating-point parameter trains."""

    TITLE: ClassVar = "full fine-tuning"

    train: str | Sequence[str] = dataclasses.field(default=r".*", hash=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Every bias trains, and the head (Ben Zaken et al. 2021, arXiv:2106.10199).

    A bias is a parameter whose last key is `bias`: those of linear layers and of layer norms.
    """

    TITLE: ClassVar = "BitFit"

    train: str | Sequence[str] = dataclasses.field(default=(r"(.*/)?bias", r"head/.*"), hash=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Only the head trains, on frozen features: the probe that adapters are measured against."""

    TITLE: ClassVar = "head only"

    train: str | Sequence[str] = dataclasses.field(default=r"head/.*", hash=False)
