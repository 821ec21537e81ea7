"""`masked_optimizer` on one tree: the split's update, and bit-unchanged everywhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from tests.core.adapted import random_like
from tests.methods.test_methods import METHODS, loss, model_params

TX = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))


def float_params():
    params = model_params()
    del params["steps"]
    # Negative zeros: x + 0.0 would turn them into positive ones.
    params["layers"]["0"]["query"]["kernel"] *= jnp.where(jnp.arange(8) % 2, 1.0, -0.0)[None]
    return params


@pytest.mark.parametrize("name", METHODS)
def test_the_update_is_that_of_splitting_first(name):
    method, params = METHODS[name], float_params()
    trainable, frozen = method.init(jax.random.key(0), params)
    trainable = random_like(trainable, 2)

    state = TX.init(trainable)

    @jax.jit
    def step(trainable, state):
        grads = jax.grad(lambda t: loss(method, frozen, t))(trainable)
        updates, _ = TX.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates)

    split = step(trainable, state)

    one = method.bind(trainable, frozen)
    tx = lj.masked_optimizer(TX, method.mask(one))

    @jax.jit
    def whole_step(one, state):
        grads = jax.grad(lambda one: loss(_Bound(), None, one))(one)
        updates, _ = tx.update(grads, state, one)
        return optax.apply_updates(one, updates)

    after = whole_step(one, tx.init(one))

    expected = jax.tree.leaves(method.bind(split, frozen))
    mask = jax.tree.leaves(method.mask(one))
    for found, want, before, trains in zip(
        jax.tree.leaves(after), expected, jax.tree.leaves(one), mask, strict=True
    ):
        if trains:
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
            assert not np.array_equal(found, before)
        else:
            assert np.asarray(found).tobytes() == np.asarray(before).tobytes()


class _Bound:
    """Binding done already: `loss` differentiates the bound tree itself."""

    def bind(self, bound, _):
        return bound


def test_masked_out_leaves_have_no_state_and_their_gradients_count_for_nothing():
    params = float_params()
    mask = lj.HeadOnly().mask(params)
    tx = lj.masked_optimizer(TX, mask)
    state = tx.init(params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == [3, 3, 18, 18]  # two moments of head/bias and head/kernel, nothing else

    grads = jax.tree.map(jnp.ones_like, params)
    wild = jax.tree.map(lambda g, m: g if m else jnp.full_like(g, jnp.nan), grads, mask)
    calm, _ = tx.update(grads, state, params)
    other, _ = tx.update(wild, state, params)
    jax.tree.map(np.testing.assert_array_equal, calm, other)


def test_a_callable_mask_integers_and_jit():
    params = model_params()  # `steps` is an integer leaf
    tx = lj.masked_optimizer(optax.sgd(0.1), lj.HeadOnly().mask)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert after["steps"] == 3
    assert after["steps"].dtype == params["steps"].dtype
    assert not np.array_equal(after["head"]["kernel"], params["head"]["kernel"])


def test_it_needs_the_parameters():
    params = float_params()
    tx = lj.masked_optimizer(optax.sgd(0.1), lj.HeadOnly().mask(params))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
