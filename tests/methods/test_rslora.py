"""rsLoRA: the scale is alpha over the root of the rank; the rest is LoRA."""

from __future__ import annotations

import numpy as np
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, matrices, parts64, trained


@pytest.mark.parametrize("rank", [1, 4])
def test_delta_is_alpha_over_root_rank_times_ab_in_float64(rank):
    method = lj.RsLoRA(targets=TARGETS, rank=rank, alpha=3.0, axes=AXES)
    params, trainable, frozen = trained(method)
    merged = method.merge(trainable, frozen)
    for name, entry in trainable.items():
        p = parts64(entry, name)
        expected = matrices(params[name], name) + 3.0 / np.sqrt(rank) * p["a"] @ p["b"]
        np.testing.assert_allclose(matrices(merged[name], name), expected, atol=2e-6)


def test_it_is_lora_with_alpha_times_the_root_of_the_rank():
    ours = lj.RsLoRA(targets=TARGETS, rank=4, alpha=3.0, axes=AXES)
    _, trainable, frozen = trained(ours)
    same = lj.LoRA(targets=TARGETS, rank=4, alpha=6.0, axes=AXES).merge(trainable, frozen)
    for name, kernel in ours.merge(trainable, frozen).items():
        np.testing.assert_allclose(kernel, same[name], atol=1e-6)


def test_the_scale_shows_in_the_table():
    rows = lj.RsLoRA(targets="plain", rank=4, alpha=3.0).table({"plain": np.ones((6, 8))})
    assert next(iter(rows)).scale == 1.5
