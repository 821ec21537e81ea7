"""Training in a random subspace: the equations, what trains, and its errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.methods import IntrinsicDimension
from lora_jax.methods.projections import dense, fastfood
from lora_jax.methods.subspace import key_of
from lora_jax.settings import Settings
from lora_jax.sweeps import Cell
from lora_jax.sweeps.pack import make_pack
from tests.methods.test_methods import X, apply, model_params

# In the tree's order, which is the order in θ; the head trains whole beside.
MOVED = ["layers/0/query/bias", "layers/0/query/kernel", "layers/0/value/bias"]
MOVED += ["layers/0/value/kernel"] + [path.replace("0", "1") for path in MOVED]
MOVED += ["layers/1/value/kernel"]
SIZE = 2 * (6 * 8 + 8 + 8 * 6 + 6)
METHODS = {
    f"{structure} {projection}": IntrinsicDimension(
        dim=7, train="head/.*", structure=structure, projection=projection
    )
    for structure in ("did", "said")
    for projection in ("fastfood", "dense")
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def columns_of(project, size, num, key):
    """P (num, size), transposed: a column at a time, compiled once for all tests."""
    return jax.vmap(lambda e: project(e, size, key))(jnp.eye(num))


def flat(tree):
    return {path: np.asarray(x, np.float64) for path, x in lj.core.trees.flatten(tree).items()}


def started(method, seed=0):
    """`(params, trainable, frozen)`, what trains moved at random."""
    params = model_params()
    trainable, frozen = method.init(jax.random.key(seed), params)
    rng = np.random.default_rng(1)
    entry = {
        part: x
        if part in method.FROZEN_PARTS
        else x + jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        for part, x in trainable["intrinsic"].items()
    }
    return params, {**trainable, "intrinsic": entry}, frozen


@pytest.mark.parametrize("name", METHODS)
def test_what_is_bound_is_the_start_and_a_step_in_the_subspace(name):
    """Eq. (2) of Li et al., with P written out a column at a time; SAID's λ is a layer's."""
    method = METHODS[name]
    params, trainable, frozen = started(method)
    entry = trainable["intrinsic"]
    project = dense if "dense" in name else fastfood
    num = entry["theta"].size
    assert num == (5 if "said" in name else 7)  # two layers' λ are two of the seven
    key = key_of(entry["key"])
    columns = columns_of(project, SIZE, num, key)
    step = np.asarray(columns, np.float64).T @ np.asarray(entry["theta"], np.float64)
    bound, before, start = flat(method.bind(trainable, frozen)), flat(params), 0
    assert list(method.moved(params)) == MOVED and sum(method.moved(params).values()) == SIZE
    for path in MOVED:
        own = step[start : start + before[path].size].reshape(before[path].shape)
        start += before[path].size
        if "said" in name:
            own = float(entry["scales"][int(path.split("/")[1])]) * own
        np.testing.assert_allclose(bound[path], before[path] + own, atol=2e-6)
        assert np.abs(own).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, method.merge(trainable, frozen),
                 method.bind(trainable, params))  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_one_is_the_base_bit_for_bit(name):
    params, method = model_params(), METHODS[name]
    trainable, frozen = method.init(jax.random.key(0), params)
    found = jax.jit(lj.lift(apply))(method.bind(trainable, frozen), X)
    assert np.array_equal(found, jax.jit(apply)(params, X))


@pytest.mark.parametrize(
    "name",
    [n if "fastfood" in n else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_the_gradient_is_the_full_one_projected(name):
    method = METHODS[name]
    params, trainable, frozen = started(method)
    loss = lambda tree: jnp.mean(apply(tree, X) ** 2)  # noqa: E731
    found = jax.jit(jax.grad(lambda t: loss(method.bind(t, frozen))))(trainable)["intrinsic"]
    bound = method.bind(trainable, frozen)
    of_arrays = jax.jit(jax.grad(lambda t: loss({**t, "steps": params["steps"]})))
    dense_gradient = flat(of_arrays({k: v for k, v in bound.items() if k != "steps"}))
    project = dense if "dense" in name else fastfood
    num, key = trainable["intrinsic"]["theta"].size, key_of(trainable["intrinsic"]["key"])
    columns = np.asarray(columns_of(project, SIZE, num, key), np.float64).T
    scales = trainable["intrinsic"].get("scales", jnp.ones(2))
    parts = [float(scales[int(p.split("/")[1])]) * dense_gradient[p].ravel() for p in MOVED]
    np.testing.assert_allclose(found["theta"], columns.T @ np.concatenate(parts), atol=2e-6)
    assert not np.any(found["key"]) and not np.any(found["layout"])


@pytest.mark.parametrize("name", ["did fastfood", "said fastfood"])
def test_adamw_trains_the_subspace_and_the_head_and_never_the_key(name):
    method, params = METHODS[name], model_params()
    trainable, frozen = method.init(jax.random.key(2), params)
    tx = method.optimizer(optax.adamw(3e-2, weight_decay=0.1))
    state, start = tx.init(trainable), trainable
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * method.table(params).num_trainable == 2 * (7 + 6 * 3 + 3)

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.mean(lj.lift(apply)(method.bind(t, frozen), X) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    values = []
    for _ in range(10):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
    assert values[-1] < values[0]
    for path, entry in start.items():
        for part, before in entry.items():
            assert np.array_equal(before, trainable[path][part]) == (part in method.FROZEN_PARTS)


@pytest.mark.parametrize("structure", ["did", pytest.param("said", marks=pytest.mark.slow)])
def test_dimensions_seeds_and_rates_share_a_program_and_end_as_alone(structure):
    def loss(params, batch):
        return jnp.mean(apply(params, batch) ** 2)

    cells = [
        {
            "method": "intrinsic",
            "dim": dim,
            "train": "head/.*",
            "lr": lr,
            "seed": seed,
            "weight_decay": 0.1,
            "structure": structure,
        }
        for dim, lr, seed in ((5, 1e-2, 0), (17, 1e-2, 1), (3, 3e-2, 1))
    ]

    def run(cells):
        return lj.sweep(loss, model_params(), [X], cells, num_steps=6, progress=False)

    together = run(cells)
    assert {row.pack for row in together} == {1} and all(row.width == 3 for row in together)
    for cell, row in zip(cells, together, strict=True):
        (alone,) = run([cell])
        assert np.max(np.abs(row.losses - alone.losses)) < 1e-5
        pairs = zip(jax.tree.leaves(row.trainable), jax.tree.leaves(alone.trainable), strict=True)
        assert max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) < 1e-4
        num_scales = 2 if structure == "said" else 0
        assert row.trainable["intrinsic"]["theta"].shape == (cell["dim"] - num_scales,)
    assert np.max(np.abs(together[0].losses[1:] - together[1].losses[1:])) > 1e-6


def test_all_dimensions_move_everywhere_and_a_dense_square_p_spans_all():
    """With d = D any θ is reached: the least-squares solution in θ_d gives it back."""
    params = {"kernel": jnp.zeros((3, 4))}
    method = IntrinsicDimension(dim=12, projection="dense")
    trainable, frozen = method.init(jax.random.key(0), params)
    wanted, key = np.random.default_rng(0).normal(size=12), key_of(trainable["intrinsic"]["key"])
    columns = np.asarray(columns_of(dense, 12, 12, key)).T
    theta = np.linalg.solve(columns.astype(np.float64), wanted)
    trainable["intrinsic"]["theta"] = jnp.asarray(theta, jnp.float32)
    found = method.merge(trainable, frozen)["kernel"]
    np.testing.assert_allclose(found.ravel(), wanted, atol=1e-4)


def test_a_base_in_bfloat16_stays_in_it():
    method, params = METHODS["did fastfood"], model_params(jnp.bfloat16)
    trainable, frozen = method.init(jax.random.key(0), params)
    bound = method.bind(trainable, frozen)
    assert jax.tree.map(jnp.result_type, bound) == jax.tree.map(jnp.result_type, params)


TIED = jnp.ones((4, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IntrinsicDimension(dim=0), "dim is 0"),
        (lambda: IntrinsicDimension(dim=2.0), "dim is 2.0"),
        (lambda: IntrinsicDimension(projection="fastfod"), "'fastfood'"),
        (lambda: IntrinsicDimension(structure="dad"), "structure is 'dad'"),
        (lambda: IntrinsicDimension(dim=999).init(jax.random.key(0), model_params()),
         "dim is 999, but only 241 parameters move"),
        (lambda: IntrinsicDimension(dim=3, structure="said").init(
            jax.random.key(0), model_params()), "needs 3 of it .* choose at least 4"),
        (lambda: IntrinsicDimension(targets="layrs/.*").init(jax.random.key(0), model_params()),
         "layrs"),
        (lambda: IntrinsicDimension(targets="head/.*", train="head/.*").init(
            jax.random.key(0), model_params()), "name nothing but what train="),
        (lambda: IntrinsicDimension(dim=2).init(jax.random.key(0), {"a": TIED, "b": TIED}),
         "are one array"),
    ],
)  # fmt: skip
def test_what_is_no_subspace_is_named(make, words):
    with pytest.raises(RequestError, match=words):
        make()


def test_parts_of_another_dimension_or_structure_are_refused():
    params = model_params()
    trainable, frozen = METHODS["did fastfood"].init(jax.random.key(0), params)
    with pytest.raises(RequestError, match="holds 7 dimensions, dim is 8"):
        IntrinsicDimension(dim=8, train="head/.*").bind(trainable, frozen)
    with pytest.raises(RequestError, match="structure='said' has"):
        METHODS["said fastfood"].bind(trainable, frozen)


def test_it_is_bound_to_the_parameters_it_was_made_for_alone():
    """P depends on all sizes and their order: another tree would be moved by something else."""
    method = IntrinsicDimension(dim=4)
    trainable, frozen = method.init(jax.random.key(0), model_params())
    for tree in (
        {k: v for k, v in model_params().items() if k != "head"},
        {**model_params(), "more": jnp.ones((2, 2))},
    ):
        with pytest.raises(RequestError, match="made for other parameters"):
            method.bind(trainable, tree)
    assert method.bind(trainable, frozen)


def test_it_goes_beside_no_other_method():
    method, other = IntrinsicDimension(dim=4), lj.LoRA(targets="head/kernel", rank=1)
    params = model_params()
    adapters = [(m, m.init(jax.random.key(0), params)[0]) for m in (method, other)]
    for pair in (adapters, adapters[::-1]):
        with pytest.raises(RequestError, match="IntrinsicDimension moves .* cannot be combined"):
            lj.merge_all(pair, params)
    with pytest.raises(RequestError, match="cannot be combined"):
        lj.Combined([other, method])
    alone = lj.merge_all(adapters[:1], params)
    jax.tree.map(np.testing.assert_array_equal, alone, method.merge(adapters[0][1], params))


def test_no_mask_says_how_it_trains():
    method, params = IntrinsicDimension(dim=4), model_params()
    trainable, frozen = method.init(jax.random.key(0), params)
    with pytest.raises(RequestError, match="computed from what trains"):
        method.mask(method.bind(trainable, frozen))


def test_a_projection_that_is_not_nested_packs_equal_dimensions_alone():
    cells = [
        {"method": "intrinsic", "projection": "grouped", "dim": dim, "lr": 1e-2, "seed": seed}
        for dim, seed in ((5, 0), (5, 1), (6, 0))
    ]
    loss = lambda params, batch: jnp.mean(apply(params, batch) ** 2)  # noqa: E731
    rows = lj.sweep(loss, model_params(), [X], cells, num_steps=2, progress=False)
    assert [row.pack for row in rows] == [1, 1, 2] and not any(row.error for row in rows)
    assert all(row.losses[1] < row.losses[0] for row in rows)


def test_what_lies_beyond_a_cells_own_dimension_stays_zero():
    methods = [IntrinsicDimension(dim=dim, train="head/.*") for dim in (9, 4)]
    params = model_params()
    own = [Cell(f"d{method.dim}", Settings(), method) for method in methods]
    pack = make_pack(own, params)
    cells = pack.init([jax.random.key(0)] * 2, [params] * 2)
    trainable = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells)
    _, frozen = methods[0].init(jax.random.key(0), params)
    tx = pack.union.optimizer(optax.adamw(1e-2, weight_decay=0.1))

    def step(trainable, state, data):
        def loss(t):
            return jnp.mean(lj.lift(apply)(pack.bind(t, (data, frozen)), X) ** 2)

        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    step = jax.jit(jax.vmap(step))
    state = jax.vmap(tx.init)(trainable)
    for _ in range(3):
        trainable, state = step(trainable, state, pack.data())
    theta = np.asarray(trainable["intrinsic"]["theta"])
    assert theta.shape == (2, 9) and np.all(theta[0] != 0)
    assert np.all(theta[1, :4] != 0) and not np.any(theta[1, 4:])
    assert pack.unpack(jax.tree.map(lambda x: x[1], trainable), 1)["intrinsic"]["theta"].size == 4


def test_a_cell_that_cannot_be_does_not_stop_the_others():
    cells = [
        {"method": "intrinsic", "structure": "said", "dim": 2, "lr": 1e-2},
        {"method": "intrinsic", "dim": 2, "lr": 1e-2},
    ]
    rows = lj.sweep(
        lambda params, batch: jnp.mean(apply(params, batch) ** 2),
        model_params(), [X], cells, num_steps=2, progress=False,
    )  # fmt: skip
    assert "needs 3 of it" in rows[0].error and not rows[1].error


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_key_of_any_kind_and_x64_give_the_same_subspace_again(impl):
    params = {"kernel": jnp.zeros((5, 4), jnp.float32)}
    method = IntrinsicDimension(dim=3)
    trainable, frozen = method.init(jax.random.key(1, impl=impl), params)
    trainable["intrinsic"]["theta"] = jnp.array([1.0, -2.0, 0.5], jnp.float32)
    found = np.asarray(method.merge(trainable, frozen)["kernel"])
    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", not before)
        again, frozen = method.init(jax.random.key(1, impl=impl), params)
        assert all(x.dtype == jnp.float32 for x in again["intrinsic"].values())
        np.testing.assert_array_equal(again["intrinsic"]["key"], trainable["intrinsic"]["key"])
        np.testing.assert_array_equal(method.merge(trainable, frozen)["kernel"], found)
    finally:
        jax.config.update("jax_enable_x64", before)
