import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import lora_jax as lj
from lora_jax.train.loss import make_loss
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.state import init_state
from lora_jax.train.step import make_train_step

SETTINGS = ConfigDict(
    {
        "lr": 3e-2,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "clip_norm": 0.1,
    }
)
METHODS = {
    "lora": lj.LoRA(targets="body/kernel", rank=2, alpha=2.0, train="head/.*"),
    "full": lj.FullFineTuning(),
    "bitfit": lj.BitFit(),
    "head": lj.HeadOnly(),
}
# No two axes alike, so that an array tells by its shape what it belongs to.
VOCABULARY, WIDTH, HIDDEN, CLASSES = 11, 5, 7, 3


def apply(params, ids, mask):
    h = params["table"][ids].mean(1)
    h = jnp.tanh(h @ params["body"]["kernel"] + params["body"]["bias"])
    return h @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "table": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "body": {
            "kernel": jax.random.normal(keys[1], (WIDTH, HIDDEN)),
            "bias": jnp.zeros(HIDDEN),
        },
        "head": {
            "kernel": jax.random.normal(keys[2], (HIDDEN, CLASSES)),
            "bias": jnp.zeros(CLASSES),
        },
    }


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    return {
        "input_ids": generator.integers(0, VOCABULARY, (16, 4)).astype(np.int32),
        "attention_mask": np.ones((16, 4), np.int32),
        "labels": generator.integers(0, CLASSES, 16).astype(np.int32),
        "weights": np.ones(16, np.float32),
    }


def begin(method, params):
    trainable, frozen = method.init(jax.random.key(1), params)
    tx = make_optimizer(SETTINGS, 100)
    step = make_train_step(make_loss(apply, method), tx)
    return step, init_state(trainable, tx, jax.random.key(2)), frozen, tx


@pytest.mark.parametrize("name", METHODS)
def test_one_step_trains_every_method(name, params, batch):
    step, state, frozen, _ = begin(METHODS[name], params)
    before = jax.tree.map(np.array, frozen)
    losses = []
    for _ in range(40):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 40
    assert losses[-1] < losses[0] - 0.1
    # The frozen tree is an argument like any other: still there, and as it was.
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))


def test_state_holds_nothing_of_the_frozen_tree(params):
    _, state, frozen, _ = begin(METHODS["lora"], params)
    assert {leaf.shape for leaf in jax.tree.leaves(frozen)} == {
        (VOCABULARY, WIDTH),
        (WIDTH, HIDDEN),
        (HIDDEN,),
    }
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    trained = [(WIDTH, 2), (2, HIDDEN), (HIDDEN, CLASSES), (CLASSES,)]
    # Each trained array thrice (itself and two moments); counters and the key have no axes.
    assert sorted(shape for shape in shapes if shape) == sorted(trained * 3)


def test_state_is_donated_and_frozen_is_not(params, batch):
    step, state, frozen, _ = begin(METHODS["lora"], params)
    step(state, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_clipping_sees_only_the_trainable_tree(params, batch):
    """Adam's first moment after one step is 0.1 of the clipped gradient."""
    method = METHODS["lora"]
    step, state, frozen, _ = begin(method, params)
    trainable, _ = method.init(jax.random.key(1), params)
    key = jax.random.fold_in(jax.random.key(2), 0)
    loss = make_loss(apply, method)
    gradients = jax.jit(jax.grad(loss, has_aux=True))(trainable, frozen, batch, key)[0]
    everything = jax.jit(jax.grad(lambda p: loss({}, p, batch, key)[0]))(params)
    norm, whole_norm = optax.global_norm(gradients), optax.global_norm(everything)
    state, metrics = step(state, frozen, batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    assert whole_norm > 1.05 * norm  # else the two could not be told apart
    clip = float(SETTINGS.clip_norm / norm)
    assert clip < 1.0
    for found, gradient in zip(
        jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu")),
        jax.tree.leaves(gradients),
        strict=True,
    ):
        np.testing.assert_allclose(found, 0.1 * clip * gradient, rtol=1e-5, atol=1e-9)


def test_each_step_has_its_own_key():
    """The key of step i is `fold_in(key, i)`: the same however often the run was resumed."""

    def loss(trainable, frozen, batch, key):
        sums = {"correct": jax.random.uniform(key), "weight": jnp.ones(())}
        return jnp.sum(trainable["w"]["value"] ** 2), sums

    tx = make_optimizer(SETTINGS, 10)
    key = jax.random.key(5)
    state = init_state({"w": {"value": jnp.ones(2)}}, tx, key)
    step = make_train_step(loss, tx)
    for number in range(3):
        state, metrics = step(state, {}, {})
        wanted = jax.random.uniform(jax.random.fold_in(key, number))
        assert float(metrics["correct"]) == float(wanted)
