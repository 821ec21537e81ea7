"""Trees with Python leaves (activations, flags, names) train in `lj.sweep` as they are."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core import trees
from lora_jax.train.build import keys_of


class Model(eqx.Module):
    mlp: eqx.nn.MLP
    activation: Callable
    is_residual: bool
    name: str

    def __call__(self, x):
        y = jax.vmap(self.mlp)(self.activation(x))
        return x + y if self.is_residual else y


def model():
    return Model(eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0)), jnp.tanh, True, "toy")


def loss(model, x):
    return jnp.mean(model(x) ** 2)


X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def test_cells_of_a_module_end_as_adamw_over_the_merged_module_does():
    params = model()
    axes = lj.kernel_axes(lambda m, x: m(x), params, X)
    cells = [{"targets": ".*weight", "rank": r, "alpha": 2, "lr": 1e-2} for r in (1, 2)]
    rows = lj.sweep(loss, params, [X], cells, num_steps=4, axes=axes, progress=False)
    method = lj.LoRA(targets=".*weight", rank=2, alpha=2, axes=axes)
    trainable, frozen = method.init(keys_of(0)[1], params)
    tx = optax.adamw(1e-2, weight_decay=0.0)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        value, gradients = jax.value_and_grad(lambda t: loss(method.merge(t, frozen), X))(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return value, optax.apply_updates(trainable, updates), state

    for seen in rows[1].losses:
        value, trainable, state = step(trainable, state)
        np.testing.assert_allclose(seen, value, rtol=1e-5)
    assert method.merge(rows[1].trainable, params).name == "toy"


@pytest.mark.parametrize("settings", [{"method": "full"}, {"method": "head", "train": ".*bias"}])
def test_what_trains_whole_parameters_takes_them_too(settings):
    (row,) = lj.sweep(loss, model(), [X], [{"lr": 1e-2, **settings}], num_steps=3, progress=False)
    assert not row.error and row.losses[-1] < row.losses[0]


def test_hidden_leaves_leave_arrays_alone_and_come_back():
    tree = {"w": jnp.ones(2), "f": jnp.tanh, "flag": False, "p": 0.5, "name": "x"}
    hidden = trees.hide_static(tree)
    assert [leaf.shape for leaf in jax.tree.leaves(hidden)] == [(2,)]
    assert jax.tree.structure(hidden) == jax.tree.structure(trees.hide_static(dict(tree)))
    assert jax.tree.structure(hidden) != jax.tree.structure(trees.hide_static({**tree, "flag": 0}))
    shown = trees.show_static(hidden)
    assert all(shown[name] is leaf for name, leaf in tree.items())
