import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.settings import OptimizerSettings
from lora_jax.train.loss import make_loss
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.state import init_state
from lora_jax.train.step import check_accumulate, make_train_step

SETTINGS = OptimizerSettings(lr=3e-2, schedule="constant", weight_decay=0.0, clip_norm=0.1)
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
    h = jnp.tanh(h @ params["body"]["kernel"] + params["body"]["bias"][None])
    return h @ params["head"]["kernel"] + params["head"]["bias"][None]


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
    norm, whole_norm = optax.tree.norm(gradients), optax.tree.norm(everything)
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


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16))])
def test_a_batch_in_parts_is_the_same_step(name, parts, params, batch):
    """With weights that differ, and a part without any: loss, gradient norm, sums and result."""
    method = METHODS[name]
    _, state, frozen, tx = begin(method, params)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, 16).astype(np.float32)
    weights[::parts] = 0.0
    batch = batch | {"weights": weights}
    loss = make_loss(apply, method)
    steps = [make_train_step(loss, tx, accumulate=n) for n in (1, parts)]
    (one, first), (other, second) = (
        step(jax.tree.map(jnp.copy, state), frozen, batch) for step in steps
    )
    for key in first:
        np.testing.assert_allclose(second[key], first[key], rtol=2e-6, err_msg=key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
        other.trainable,
        one.trainable,
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one.trainable, state.trainable)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_batch_in_parts_draws_dropout_for_each():
    """With equal rows the loss of two parts is the mean of two draws, not of one twice."""
    method = lj.LoRA(targets="body/kernel", rank=2, alpha=2.0, dropout=0.5)
    keys = jax.random.split(jax.random.key(3), 2)
    params = {"body": {"kernel": jax.random.normal(keys[0], (6, 3))}}
    trainable, frozen = method.init(keys[1], params)
    trainable["body/kernel"]["b"] = jnp.array([[1.0, -1.0, 0.5], [0.0, 1.0, -1.0]])

    def bare(params, ids, mask):
        return ids.astype(jnp.float32) @ params["body"]["kernel"]

    ids = np.arange(1, 7)[None].repeat(2, 0)
    batch = {
        "input_ids": ids, "attention_mask": ids, "labels": np.zeros(2, np.int32),
        "weights": np.ones(2, np.float32),
    }  # fmt: skip
    tx, loss = optax.sgd(0.0), make_loss(bare, method)
    in_parts = make_train_step(loss, tx, accumulate=2)
    one_row = jax.tree.map(lambda x: x[:1], batch)
    for seed in range(5):
        key = jax.random.key(seed)
        found = in_parts(init_state(trainable, tx, key), frozen, batch)[1]["loss"]
        key = jax.random.fold_in(key, 0)  # of the first step
        draws = [loss(trainable, frozen, one_row, jax.random.fold_in(key, n))[0] for n in (0, 1)]
        assert abs(float(draws[0] - draws[1])) > 1e-3
        assert float(found) == pytest.approx(float(sum(draws)) / 2, rel=1e-5)


@pytest.mark.parametrize("parts", [0, 3, 1.5, True, "2"])
def test_parts_that_do_not_divide_the_batch_are_named(parts):
    with pytest.raises(lj.RequestError, match="divides data.batch_size=16"):
        check_accumulate(parts, 16)


def test_sixteen_bits_do_not_lose_a_sum_of_many_parts():
    """Parameters in bfloat16, 256 parts: as in one part, to the last bit but one."""
    method = lj.FullFineTuning()
    params = {"w": jnp.ones((4, 2), jnp.bfloat16)}

    def linear(params, ids, mask):
        return ids.astype(jnp.bfloat16) @ params["w"]

    generator = np.random.default_rng(0)
    batch = {
        "input_ids": generator.normal(size=(256, 4)).astype(np.float32),
        "attention_mask": np.ones((256, 4), np.int32),
        "labels": generator.integers(0, 2, 256).astype(np.int32),
        "weights": np.full(256, 300.0, np.float32),
    }
    tx = optax.sgd(1.0)
    found = []
    for parts in (1, 256):
        trainable, frozen = method.init(jax.random.key(0), params)
        step = make_train_step(make_loss(linear, method), tx, accumulate=parts)
        state, _ = step(init_state(trainable, tx, jax.random.key(1)), frozen, batch)
        assert state.trainable["w"]["value"].dtype == jnp.bfloat16
        found.append(np.asarray(state.trainable["w"]["value"], np.float32))
    np.testing.assert_allclose(found[1], found[0], rtol=2.0**-7)
    assert np.abs(found[0] - 1).max() > 0.01
