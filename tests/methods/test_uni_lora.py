"""Uni-LoRA: LoRA's factors in one random subspace, against P as a matrix in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.io.run_adapter import load_trainable, save_trainable
from lora_jax.methods.projections import fastfood, grouped
from lora_jax.methods.subspace import key_of
from tests.methods.variants import AXES, TARGETS, X, apply, params_of

METHODS = {
    f"{projection} {start}": lj.UniLoRA(
        targets=TARGETS, rank=2, alpha=6, dim=19, axes=AXES, train="head",
        projection=projection, start=start,
    )
    for projection in ("grouped", "fastfood")
    for start in ("uniform", "lora")
}  # fmt: skip
FAST = ("grouped uniform", "fastfood lora")
NAMES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
PROJECT = {"grouped": grouped, "fastfood": fastfood}


def begun(name, seed=1):
    params = params_of()
    return params, *METHODS[name].init(jax.random.key(seed), params)


def moved(name):
    """Away from the start, so that both factors take part."""
    params, trainable, frozen = begun(name)
    rng = np.random.default_rng(4)
    entry = trainable["uni_lora"]
    theta = entry["theta"] + jnp.asarray(rng.normal(size=19), jnp.float32)
    return params, {**trainable, "uni_lora": {**entry, "theta": theta}}, frozen


def in_order(adapters):
    return [x.ravel() for name in adapters if name != "head" for x in adapters[name].values()]


@pytest.mark.parametrize("num, size", [(1, 1), (3, 50), (19, 200), (200, 200)])
def test_a_grouped_projection_has_orthonormal_columns_of_one_entry_a_row(num, size):
    key = jax.random.key(7)
    p = np.asarray(jax.vmap(lambda e: grouped(e, size, key))(jnp.eye(num)), np.float64).T
    np.testing.assert_allclose(p.T @ p, np.eye(num), atol=1e-6)
    assert np.all((p != 0).sum(axis=1) == 1)
    counts = (p != 0).sum(axis=0)
    assert counts.max() - counts.min() <= 1


def test_the_adjoint_of_grouped_matches_the_product():
    rng = np.random.default_rng(0)
    theta, x = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (300, 5000))
    forward, transpose = jax.vjp(lambda t: grouped(t, 5000, jax.random.key(1)), theta)
    inner = np.vdot(np.asarray(x, np.float64), forward)
    assert abs(inner - np.vdot(np.asarray(transpose(x)[0], np.float64), theta)) < 1e-3
    assert not np.array_equal(forward, grouped(theta, 5000, jax.random.key(2)))


@pytest.mark.parametrize("name", NAMES)
def test_the_factors_are_the_start_and_p_theta(name):
    params, trainable, _ = moved(name)
    _, fresh, _ = begun(name)
    lora, adapters = METHODS[name].to_lora(trainable, params)
    assert type(lora) is lj.LoRA and lora.rules[0].alpha == 6
    entry = trainable["uni_lora"]
    flat = np.concatenate(in_order(adapters))
    project = PROJECT[name.split()[0]]
    key = key_of(entry["key"])
    columns = jax.vmap(lambda e: project(e, flat.size, key))(jnp.eye(19))
    step = np.asarray(columns, np.float64).T @ np.asarray(entry["theta"], np.float64)
    if name.endswith("lora"):
        begun_at = METHODS[name].to_lora(fresh, params)[1]
        assert not any(np.any(begun_at[n]["b"]) for n in begun_at if n != "head")
        assert all(np.any(begun_at[n]["a"]) for n in begun_at if n != "head")
        step = step + np.concatenate(in_order(begun_at))
    np.testing.assert_allclose(flat, step, atol=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_one_is_the_base_with_loras_start_alone(name):
    params, trainable, frozen = begun(name)
    found = jax.jit(lj.lift(apply))(METHODS[name].bind(trainable, frozen), X)
    base = jax.jit(apply)(params, X)
    assert np.array_equal(found, base) == name.endswith("lora")
    assert np.max(np.abs(found - base)) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_the_merged_model(name):
    method = METHODS[name]
    params, trainable, frozen = moved(name)

    def lifted(t):
        return jnp.sum(jnp.sin(lj.lift(apply)(method.bind(t, frozen), X)))

    def merged(t):
        return jnp.sum(jnp.sin(apply(method.merge(t, params), X)))

    (one, own), (other, wanted) = (
        jax.jit(jax.value_and_grad(f))(trainable) for f in (lifted, merged)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    theta, expected = own["uni_lora"]["theta"], wanted["uni_lora"]["theta"]
    assert np.max(np.abs(expected)) > 0.01
    np.testing.assert_allclose(
        theta, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))) + 1e-6
    )
    assert not np.any(own["uni_lora"]["key"])


def test_it_may_be_closed_over_by_a_compiled_function():
    """What it was made for is checked against numbers, also while others are traced."""
    for method in (METHODS["grouped uniform"], lj.IntrinsicDimension(dim=4)):
        params = params_of()
        trainable, frozen = method.init(jax.random.key(1), params)
        found = jax.jit(lambda x: lj.lift(apply)(method.bind(trainable, frozen), x))(X)  # noqa: B023
        np.testing.assert_allclose(found, apply(method.merge(trainable, params), X), atol=1e-4)


def test_it_trains_its_vector_and_the_head_and_nothing_else():
    method = METHODS["grouped uniform"]
    params, trainable, frozen = begun("grouped uniform")
    table = method.table(params)
    assert table.num_trainable == 19 + 18
    tx = method.optimizer(optax.adamw(3e-2, weight_decay=0.1))
    state, start = tx.init(trainable), trainable

    @jax.jit
    def step(trainable, state):
        def loss(t):
            return jnp.mean((lj.lift(apply)(method.bind(t, frozen), X) - 1.0) ** 2)

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(8):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    for part in ("key", "layout"):
        assert np.array_equal(trainable["uni_lora"][part], start["uni_lora"][part])


def test_seeds_and_rates_share_a_program_and_end_as_alone():
    cells = [
        {
            "method": "uni_lora", "targets": "plain|table", "rank": 2, "dim": 9, "lr": lr,
            "seed": seed, "train": "head",
        }
        for lr, seed in ((1e-2, 0), (3e-2, 1))
    ]  # fmt: skip

    def run(cells):
        loss = lambda p, batch: jnp.mean(apply(p, batch) ** 2)  # noqa: E731
        return lj.sweep(loss, params_of(), [X], cells, num_steps=4, axes=AXES, progress=False)

    together = run(cells)
    assert {row.pack for row in together} == {1}
    for cell, row in zip(cells, together, strict=True):
        (alone,) = run([cell])
        assert np.max(np.abs(row.losses - alone.losses)) < 1e-5


def test_a_file_gives_it_back(tmp_path):
    method = METHODS["fastfood lora"]
    params, trainable, frozen = moved("fastfood lora")
    save_trainable(tmp_path / "adapter", trainable, {})
    again, _ = load_trainable(tmp_path / "adapter")
    jax.tree.map(
        np.testing.assert_array_equal, method.merge(again, frozen), method.merge(trainable, frozen)
    )


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 10_000}, "choose a smaller one"),
        ({"projection": "dense"}, "projection is 'dense'"),
        ({"start": "zero"}, "start is 'zero'"),
        ({"targets": ()}, "needs targets"),
        ({"targets": "nothing"}, "nothing"),
        ({"rank": 0}, "rank is 0"),
        ({"rows": {"table": (1,)}}, "has no rows"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(RequestError, match=says):
        method = lj.UniLoRA(**{"targets": TARGETS, "rank": 2, "dim": 5, "axes": AXES, **settings})
        method.init(jax.random.key(0), params_of())


def test_what_is_of_another_method_or_tree_is_named():
    params, trainable, frozen = begun("grouped uniform")
    wider = lj.UniLoRA(targets=TARGETS, rank=2, dim=20, axes=AXES, train="head")
    with pytest.raises(RequestError, match="dim is 20"):
        wider.bind(trainable, frozen)
    fewer = lj.UniLoRA(targets="plain", rank=2, dim=19, axes=AXES, train="head")
    with pytest.raises(RequestError, match="made for other parameters"):
        fewer.bind(trainable, frozen)
    method = METHODS["grouped uniform"]
    with pytest.raises(RequestError, match="computed from what trains"):
        method.mask(method.bind(trainable, frozen))
