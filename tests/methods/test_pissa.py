"""PiSSA: starts from the principal part; the residual is what is frozen."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, matrices, params_of, parts64, trained

METHOD = lj.PiSSA(targets=TARGETS, rank=2, alpha=3.0, axes=AXES)


def test_the_factors_start_as_the_best_approximation_of_the_kernel_in_float64():
    params = params_of()
    trainable, _ = METHOD.init(jax.random.key(0), params)
    for name, entry in trainable.items():
        p = parts64(entry, name)
        u, s, v = np.linalg.svd(matrices(params[name], name), full_matrices=False)
        best = (u[..., :2] * s[:, None, :2]) @ v[:, :2]
        np.testing.assert_allclose(1.5 * p["a"] @ p["b"], best, atol=3e-6)
        # √S in each: the columns of a and the rows of b have the same norms.
        norms = [np.sqrt((p["a"] ** 2).sum(1)), np.sqrt((p["b"] ** 2).sum(2))]
        np.testing.assert_allclose(*norms, rtol=1e-4)
        np.testing.assert_allclose(norms[0] ** 2 * 1.5, s[:, :2], rtol=1e-4)


def test_the_merged_kernel_is_residual_plus_adapter_in_float64():
    params, trainable, frozen = trained(METHOD)
    merged = METHOD.merge(trainable, frozen)
    for name, entry in trainable.items():
        p = parts64(entry, name)
        w = matrices(params[name], name)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        residual = w - (u[..., :2] * s[:, None, :2]) @ v[:, :2]
        expected = residual + 1.5 * p["a"] @ p["b"]
        np.testing.assert_allclose(matrices(merged[name], name), expected, atol=5e-6)


def test_the_base_stays_what_it_was_and_the_full_tree_serves():
    params, trainable, frozen = trained(METHOD)
    for name, kernel in params.items():
        assert np.array_equal(kernel, frozen[name])
    np.testing.assert_array_equal(
        METHOD.merge(trainable, params)["plain"], METHOD.merge(trainable, frozen)["plain"]
    )


def test_it_has_no_init():
    with pytest.raises(lj.RequestError, match="PiSSA has no init"):
        lj.PiSSA(targets="plain", init="gaussian")
