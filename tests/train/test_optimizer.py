import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.methods.masked import by_part
from lora_jax.parallel.offload import leaf_by_leaf
from lora_jax.settings import OptimizerSettings
from lora_jax.train.optimizer import make_optimizer, make_schedule, optimizer_parts

DEFAULTS = {
    "lr": 1e-2,
    "schedule": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "clip_norm": 1.0,
}


def settings(**changes):
    return OptimizerSettings(**DEFAULTS | changes)


def reference_lr(step, *, lr, schedule, warmup_ratio, num_steps):
    """The rates of `transformers.get_scheduler`, from its documentation."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return lr * step / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    factor = {
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": 1.0,
    }[schedule]
    return lr * factor


def reference_adamw(params, gradients, rates, s):
    """AdamW with global-norm clipping in float64 NumPy; yields the parameters after each step."""
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for count, (grads, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
        shrink = min(1.0, s.clip_norm / norm) if s.clip_norm else 1.0
        for name, g in grads.items():
            g = g * shrink
            m[name] = s.beta1 * m[name] + (1 - s.beta1) * g
            v[name] = s.beta2 * v[name] + (1 - s.beta2) * g * g
            m_hat, v_hat = m[name] / (1 - s.beta1**count), v[name] / (1 - s.beta2**count)
            step = m_hat / (np.sqrt(v_hat) + s.eps) + s.weight_decay * params[name]
            params[name] = params[name] - lr * step
        yield dict(params)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.06, 1.0])
def test_schedule_is_that_of_transformers(schedule, warmup_ratio):
    num_steps = 37
    made = make_schedule(settings(schedule=schedule, warmup_ratio=warmup_ratio), num_steps)
    for step in range(num_steps):
        wanted = reference_lr(
            step, lr=1e-2, schedule=schedule, warmup_ratio=warmup_ratio, num_steps=num_steps
        )
        assert float(made(step)) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("warmup_steps", [1, 9, 50])
def test_warm_up_in_steps_is_that_of_as_many(warmup_steps):
    """Also of more steps than there are: then the rate rises to the end."""
    made = make_schedule(settings(warmup_ratio=0.0, warmup_steps=warmup_steps), 36)
    for step in range(36):
        down = (36 - step) / max(1, 36 - warmup_steps)
        wanted = 1e-2 * (step / warmup_steps if step < warmup_steps else down)
        assert float(made(step)) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_optimizer_is_adamw_with_clipping(clip_norm):
    s = settings(clip_norm=clip_norm, warmup_ratio=0.3)
    generator = np.random.default_rng(0)
    start = {"a": generator.standard_normal((3, 2)), "b": generator.standard_normal(4)}
    gradients = [
        {name: generator.standard_normal(value.shape) for name, value in start.items()}
        for _ in range(10)
    ]
    rates = [
        reference_lr(i, lr=s.lr, schedule="linear", warmup_ratio=0.3, num_steps=10)
        for i in range(10)
    ]
    tx = make_optimizer(s, 10)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = tx.init(params)
    for grads, wanted in zip(
        gradients, reference_adamw(dict(start), gradients, rates, s), strict=True
    ):
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        for name in wanted:
            np.testing.assert_allclose(params[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_the_head_and_paths_have_rates_of_their_own():
    """As two optimizers with one clipping norm: each parameter moves as its rate alone has it."""
    generator = np.random.default_rng(0)
    shapes = {"head/kernel": {"value": (3, 2)}, "encoder/kernel": {"a": (4, 2), "b": (2, 4)}}
    params, grads = (
        {
            path: {part: jnp.asarray(generator.standard_normal(shape), jnp.float32)
                   for part, shape in entry.items()}
            for path, entry in shapes.items()
        }
        for _ in range(2)
    )  # fmt: skip

    def moved(**changes):
        tx = make_optimizer(settings(weight_decay=0.1, clip_norm=1.0, **changes), 10)
        own, state = params, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, own)
            own = optax.apply_updates(own, updates)
        return own

    both = moved(lr=1e-3, head_lr=1e-2)
    at = {rate: moved(lr=rate) for rate in (1e-3, 1e-2, 1e-1)}
    for path, wanted in (("head/kernel", at[1e-2]), ("encoder/kernel", at[1e-3])):
        for part, value in both[path].items():
            np.testing.assert_array_equal(value, wanted[path][part])
    # The first expression that matches a part, or its parameter, counts; then head_lr, then lr.
    paths = ((".*/b", 1e-1), (".*kernel/b", 5e-1), ("encoder/.*", 1e-2))
    found = moved(lr=1e-3, head_lr=1e-1, lr_by_path=paths)
    for path, part, rate in (
        ("encoder/kernel", "b", 1e-1), ("encoder/kernel", "a", 1e-2), ("head/kernel", "value", 1e-1)
    ):  # fmt: skip
        np.testing.assert_array_equal(found[path][part], at[rate][path][part])
    whole = moved(lr=1e-3, lr_by_path=(("head/kernel", 1e-2),))
    np.testing.assert_array_equal(whole["head/kernel"]["value"], at[1e-2]["head/kernel"]["value"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_lr": 1e-2}, "optimizer.head_lr=0.01 needs optimizer.offload=False"),
        ({"lr_by_path": ((".*/b", 1e-2),)}, "optimizer.lr_by_path=.* needs optimizer.offload"),
    ],
)
def test_rates_by_path_are_refused_where_parameters_are_updated_one_by_one(changes, message):
    with pytest.raises(RequestError, match=message):
        optimizer_parts(settings(lr=1e-3, **changes), 10)


def test_an_expression_that_matches_nothing_or_is_no_expression_is_named():
    params = {"encoder/kernel": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}
    with pytest.raises(
        RequestError, match=r"'.\*/c' matches nothing that trains; .*encoder/kernel"
    ):
        make_optimizer(settings(lr=1e-3, lr_by_path=((".*/c", 1e-2),)), 10).init(params)
    with pytest.raises(RequestError, match=r"lr_by_path=.*must be pairs of a regular expression"):
        make_optimizer(settings(lr=1e-3, lr_by_path=(("*b", 1e-2),)), 10)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_moments_of_narrow_parameters_are_float32(dtype):
    params = {"narrow": jnp.ones((4, 3), dtype), "wide": jnp.ones(2)}
    tx = make_optimizer(settings(), 10)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    moments = [optax.tree_utils.tree_get(state, name) for name in ("mu", "nu")]
    floats = jax.tree.leaves(moments)
    assert len(floats) == 4  # both moments of both parameters
    assert all(x.dtype == jnp.float32 for x in floats)
    assert {name: x.dtype for name, x in optax.apply_updates(params, updates).items()} == {
        "narrow": dtype,
        "wide": jnp.float32,
    }


def test_bfloat16_second_moment_keeps_falling():
    """In bfloat16, 0.999 * v rounds back to v; in float32 it does not."""
    params = {"w": jnp.ones((), jnp.bfloat16)}
    tx = make_optimizer(settings(clip_norm=0.0), 100)
    _, state = tx.update({"w": jnp.ones((), jnp.bfloat16)}, tx.init(params), params)
    for _ in range(50):
        _, state = tx.update({"w": jnp.zeros((), jnp.bfloat16)}, state, params)
    nu = optax.tree_utils.tree_get(state, "nu")["w"]
    assert float(nu) == pytest.approx(0.001 * 0.999**50, rel=1e-4)


def test_runs_that_differ_in_their_rate_share_a_program():
    params = {"w": jnp.ones((3, 2))}

    def lowered(lr):
        tx = make_optimizer(settings(lr=lr), 10)
        return jax.jit(tx.update).lower(params, tx.init(params), params).as_text()

    assert lowered(1e-2) == lowered(3e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1e-3}, "optimizer.lr=-0.001"),
        ({"lr": math.nan}, "optimizer.lr=nan"),
        ({"schedule": "linaer"}, "'linear'"),
        ({"warmup_ratio": 1.5}, "optimizer.warmup_ratio=1.5"),
        ({"warmup_ratio": 0.0, "warmup_steps": -1}, "optimizer.warmup_steps=-1"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "set one of them to 0"),
        ({"beta1": 1.0}, "optimizer.beta1=1.0"),
        ({"beta2": -0.1}, "optimizer.beta2=-0.1"),
        ({"eps": 0.0}, "optimizer.eps=0.0"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm=-1.0"),
    ],
)
def test_value_out_of_range_is_named(changes, words):
    with pytest.raises(RequestError) as caught:
        make_optimizer(settings(**changes), 10)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_leaf_by_leaf_is_the_optimizer(moments, clip_norm):
    """With a learning rate of its own for a part, and one that is fixed, as methods have them."""
    own = settings(clip_norm=clip_norm, moment_dtype=moments)
    clip, each = optimizer_parts(own, 10)
    rng = np.random.default_rng(0)
    params = {
        name: {part: jnp.asarray(rng.normal(size=(3, 4)), dtype) for part in ("a", "b")}
        for name, dtype in (("one", jnp.float32), ("two", jnp.bfloat16))
    }
    rates = {("one", "a"): 16.0, ("two", "b"): 0.0}
    both = [
        by_part(tx, lambda name, part: rates.get((name, part), 1.0))
        for tx in (make_optimizer(own, 10), leaf_by_leaf(each, clip))
    ]
    states, trees = [tx.init(params) for tx in both], [params, params]
    for _ in range(5):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        for n, tx in enumerate(both):
            updates, states[n] = tx.update(gradients, states[n], trees[n])
            trees[n] = optax.apply_updates(trees[n], updates)
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-6
        )
    assert jnp.array_equal(trees[1]["two"]["b"], params["two"]["b"])
