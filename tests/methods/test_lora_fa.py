"""LoRA-FA and the frozen random `a` of "Asymmetry in LoRA"."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, params_of, step_of, trained


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "orthogonal"])
def test_only_b_trains_and_a_is_as_drawn(init):
    method = lj.LoRAFA(targets=TARGETS, rank=3, axes=AXES, init=init)
    trainable, _ = method.init(jax.random.key(1), params_of())
    drawn, _ = lj.LoRA(targets=TARGETS, rank=3, axes=AXES, init=init).init(
        jax.random.key(1), params_of()
    )
    for name, entry in trainable.items():
        assert np.array_equal(entry["a"], drawn[name]["a"])
    counts = {row.path: row.num_trainable for row in method.table(params_of())}
    assert counts == {name: entry["b"].size for name, entry in trainable.items()}


def test_an_orthogonal_a_has_orthonormal_columns_in_every_matrix():
    trainable, _ = lj.LoRAFA(targets=TARGETS, rank=3, axes=AXES, init="orthogonal").init(
        jax.random.key(1), params_of()
    )
    for entry in trainable.values():
        a = np.asarray(entry["a"], np.float64)
        gram = np.einsum("...ir,...iq->...rq", a, a)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-6)


def test_no_gradient_of_a_is_computed():
    """Its product with the inputs is 2 · tokens · width · rank FLOPs, twice here."""
    lora, frozen_a = (step_of(kind).cost_analysis()["flops"] for kind in (lj.LoRA, lj.LoRAFA))
    assert lora - frozen_a >= 2 * (2 * 512 * 256 * 8)


def test_the_mask_of_a_bound_tree_leaves_a_out():
    method = lj.LoRAFA(targets="plain", rank=2)
    _, trainable, frozen = trained(method)
    mask = method.mask(method.bind(trainable, frozen))
    assert (mask["plain"].a, mask["plain"].b, mask["plain"].kernel) == (False, True, False)
