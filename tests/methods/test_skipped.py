"""What meets no product gets no adapter where `axes` say so: skipped, listed, named if alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

KEY = jax.random.key(0)
PARAMS = {
    "bias": jnp.ones((4, 1, 1)),
    "cls": jnp.ones((1, 1, 8)),
    "norm": jnp.ones((1, 1, 1, 8)),
    "scale": jnp.ones((1, 8)),
    "unused": jnp.ones((3, 8)),
    "w": jax.random.normal(KEY, (8, 8)),
}


def apply(params, x):
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (2, 1, 8)), x * params["norm"][0]], 1)
    return ((x * params["scale"][None]) @ params["w"])[:, :, None] + params["bias"][None]


X = jnp.ones((2, 3, 8))
AXES = lj.kernel_axes(apply, PARAMS, X)
KINDS = {
    "LoRA": lambda **s: lj.LoRA(rank=2, alpha=3.0, **s),
    "DoRA": lambda **s: lj.DoRA(rank=2, alpha=3.0, **s),
    "UniLoRA": lambda **s: lj.UniLoRA(rank=2, dim=4, **s),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_for_everything_adapts_what_meets_a_product_and_lists_the_rest(kind):
    method = KINDS[kind](targets=".*", axes=AXES)
    table = method.table(PARAMS)
    assert table.skipped == ("bias", "cls", "norm", "scale", "unused")
    assert "no adapter, since in no product: bias, cls, norm, scale, unused" in str(table)
    trainable, frozen = method.init(KEY, PARAMS)
    # Merging leaves what was skipped as it was.
    trainable = {
        name: {part: x if part in method.FROZEN_PARTS else x + 0.1 for part, x in parts.items()}
        for name, parts in trainable.items()
    }
    merged = method.merge(trainable, frozen)
    changed = {path for path in PARAMS if not np.array_equal(merged[path], PARAMS[path])}
    assert changed == {"w"}


def test_what_is_trained_whole_is_not_listed_as_skipped():
    method = lj.LoRA(targets=".*", rank=2, axes=AXES, train="norm")
    assert method.table(PARAMS).skipped == ("bias", "cls", "scale", "unused")


@pytest.mark.parametrize("path", ["unused", "bias", "scale"])
def test_what_meets_no_product_is_named_where_it_is_asked_for_alone(path):
    with pytest.raises(lj.RequestError, match=rf"'{path}'.*in no product of the model"):
        lj.LoRA(targets=path, rank=1, axes=AXES).init(KEY, PARAMS)


def test_quantize_leaves_what_meets_no_product():
    with pytest.warns(lj.quant.SkippedWarning, match="'unused' is in no product of the model"):
        stored = lj.quant.quantize(PARAMS, ".*", axes=AXES)
    assert [path for path in PARAMS if stored[path] is not PARAMS[path]] == ["w"]
    with pytest.raises(lj.RequestError, match="name no matrix: 'cls' is in no product"):
        lj.quant.quantize(PARAMS, "cls", axes=AXES)


def test_numbers_in_paths_are_explained():
    params = [{"w": jnp.ones((3, 3))}, jnp.ones((3, 3))]
    with pytest.raises(lj.RequestError, match="a number in a path is a place in a list or tuple"):
        lj.LoRA(targets="second", rank=1).init(KEY, params)
