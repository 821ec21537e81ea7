"""VeRA: two trained vectors around shared random factors."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, matrices, params_of, parts64, trained

METHOD = lj.VeRA(targets=TARGETS, rank=5, axes=AXES)


def random_factors(name, stack=1):
    """A (in, r) and B (r, out) as the method has them, found from outside: with unit vectors."""
    params = params_of()
    trainable, frozen = METHOD.init(jax.random.key(0), params)
    ones = {n: jax.tree.map(np.ones_like, entry) for n, entry in trainable.items()}
    bound = METHOD.bind(ones, frozen)[name]
    a = np.asarray(bound.a, np.float64).reshape(stack, -1, 5)
    return a, np.asarray(bound.b, np.float64).reshape(stack, 5, -1)


@pytest.mark.parametrize("name", ["plain", "stacked", "heads", "table"])
def test_delta_is_a_d_b_b_in_float64(name):
    params, trainable, frozen = trained(METHOD)
    p = parts64(trainable[name], name)
    a, b = random_factors(name, 2 if name == "stacked" else 1)
    d, by_output = p["lambda_d"].reshape(len(a), 1, 5), p["lambda_b"].reshape(len(a), 1, -1)
    expected = matrices(params[name], name) + (a * d) @ b * by_output
    merged = METHOD.merge(trainable, frozen)[name]
    np.testing.assert_allclose(matrices(merged, name), expected, atol=5e-6)


def test_kernels_of_equal_size_share_their_random_factors_and_a_seed_changes_them():
    a, b = random_factors("stacked", 2)
    assert np.array_equal(a[0], a[1]) and np.array_equal(b[0], b[1])
    _, trainable, frozen = trained(METHOD)
    other = lj.VeRA(targets=TARGETS, rank=5, axes=AXES, projection_seed=1)
    assert not np.allclose(
        METHOD.merge(trainable, frozen)["plain"], other.merge(trainable, frozen)["plain"]
    )


def test_d_starts_at_a_tenth_and_only_the_vectors_travel():
    trainable, _ = METHOD.init(jax.random.key(0), params_of())
    assert {part for entry in trainable.values() for part in entry} == {"lambda_d", "lambda_b"}
    assert np.all(np.asarray(trainable["plain"]["lambda_d"]) == np.float32(0.1))
    assert not np.any(trainable["plain"]["lambda_b"])
    # RoBERTa-base, q and v, rank 1024: 43,008 parameters (the paper's Table 2 says 0.043M).
    shapes = {
        f"{n}/{m}": jax.ShapeDtypeStruct((768, 768), np.float32) for n in range(12) for m in "qv"
    }
    assert lj.VeRA(targets=".*", rank=1024).table(shapes).num_trainable == 43_008


@pytest.mark.parametrize("setting", [{"alpha": 2.0}, {"init": "gaussian"}])
def test_settings_without_a_meaning_are_refused(setting):
    with pytest.raises(lj.RequestError, match="VeRA has no"):
        lj.VeRA(targets="plain", **setting)
    with pytest.raises(lj.RequestError, match="projection_seed"):
        lj.VeRA(targets="plain", projection_seed=0.5)
