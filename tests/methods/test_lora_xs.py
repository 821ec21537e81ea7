"""LoRA-XS: a small matrix between the frozen singular vectors of the kernel."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, matrices, params_of, parts64, trained

METHOD = lj.LoRAXS(targets=TARGETS, rank=3, alpha=6.0, axes=AXES)


def test_delta_is_between_the_singular_vectors_in_float64():
    """scale · V R Σ Uᵀ, checked through the singular values and projections of NumPy's SVD."""
    params, trainable, frozen = trained(METHOD)
    merged = METHOD.merge(trainable, frozen)
    for name, entry in trainable.items():
        w, p = matrices(params[name], name), parts64(entry, name)
        delta = matrices(merged[name], name) - w
        np.testing.assert_allclose(delta, 2.0 * p["a"] @ p["core"] @ p["b"], atol=5e-6)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        inside = u[..., :3] @ np.swapaxes(u[..., :3], 1, 2)
        np.testing.assert_allclose(inside @ delta, delta, atol=1e-5)
        # a's columns are orthonormal, b's rows are as long as the singular values.
        gram = np.swapaxes(p["a"], 1, 2) @ p["a"]
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-5)
        np.testing.assert_allclose(np.sqrt((p["b"] ** 2).sum(2)), s[:, :3], rtol=1e-5)


def test_r_by_r_parameters_train_and_start_small():
    trainable, _ = METHOD.init(jax.random.key(0), params_of())
    counts = {row.path: row.num_trainable for row in METHOD.table(params_of())}
    assert counts == {"plain": 9, "stacked": 18, "heads": 9, "table": 9}
    core = np.concatenate([np.ravel(entry["core"]) for entry in trainable.values()])
    assert 0.5e-5 < core.std() < 2e-5


def test_it_has_no_init():
    with pytest.raises(lj.RequestError, match="LoRAXS has no init"):
        lj.LoRAXS(targets="plain", init="gaussian")
