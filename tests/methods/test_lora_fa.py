"""LoRA-FA and the frozen random `a` of "Asymmetry in LoRA"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, X, apply, params_of, trained


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
    """The program has one product less for each adapter than LoRA's: that of a's gradient."""

    def products(method):
        _, trainable, frozen = trained(method)
        loss = lambda t: jnp.mean(lj.lift(apply)(method.bind(t, frozen), X) ** 2)  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(trainable).compile().as_text()
        return text.count(" dot(")

    assert products(lj.LoRAFA(targets="plain|heads", rank=2, axes=AXES)) == (
        products(lj.LoRA(targets="plain|heads", rank=2, axes=AXES)) - 2
    )


def test_the_mask_of_a_bound_tree_leaves_a_out():
    method = lj.LoRAFA(targets="plain", rank=2)
    _, trainable, frozen = trained(method)
    mask = method.mask(method.bind(trainable, frozen))
    assert (mask["plain"].a, mask["plain"].b, mask["plain"].kernel) == (False, True, False)
