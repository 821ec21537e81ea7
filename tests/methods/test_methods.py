"""The contract of `Method`: what trains, what stays, and the errors that name the way out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core import trees
from tests.core.adapted import normal, random_like

ALIASES = {"q": r"layers/\d+/query/kernel", "v": r"layers/\d+/value/kernel"}


def model_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def dense(i, o):
        return {"kernel": normal(rng, (i, o), dtype, i**-0.5), "bias": jnp.zeros(o, dtype)}

    return {
        "layers": {str(n): {"query": dense(6, 8), "value": dense(8, 6)} for n in range(2)},
        "head": dense(6, 3),
        "steps": jnp.int32(3),
    }


def apply(params, x):
    for layer in params["layers"].values():
        h = jnp.tanh(x @ layer["query"]["kernel"] + layer["query"]["bias"][None])
        x = x + h @ layer["value"]["kernel"] + layer["value"]["bias"][None]
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


METHODS = {
    "lora": lj.LoRA(targets="q,v", rank=2, alpha=3.0, train=r"head/.*", aliases=ALIASES),
    "lora gaussian": lj.LoRA(targets=r".*/kernel", rank=1, alpha=1.0, init="gaussian"),
    "full": lj.FullFineTuning(),
    "bitfit": lj.BitFit(),
    "head": lj.HeadOnly(),
}
X = normal(np.random.default_rng(1), (5, 6))


def loss(method, frozen, trainable):
    return jnp.mean(lj.lift(apply)(method.bind(trainable, frozen), X) ** 2)


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_method_is_the_base(name):
    params = model_params()
    trainable, frozen = METHODS[name].init(jax.random.key(3), params)
    out = jax.jit(lj.lift(apply))(METHODS[name].bind(trainable, frozen), X)
    assert np.array_equal(out, jax.jit(apply)(params, X))


@pytest.mark.parametrize("name", METHODS)
def test_one_unchanged_step_trains_every_method_and_only_what_it_names(name):
    method, params = METHODS[name], model_params()
    trainable, frozen = method.init(jax.random.key(3), params)
    tx = optax.adamw(1e-2)
    state, start = tx.init(trainable), trainable
    losses = []

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(lambda t: loss(method, frozen, t))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    for _ in range(8):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), start, trainable)
    assert all(jax.tree.leaves(moved))
    merged = dict(trees.flatten(method.merge(trainable, frozen)).items())
    for path, before in trees.flatten(params).items():
        assert (not np.array_equal(merged[path], before)) == (path in trainable), path


@pytest.mark.parametrize("name", METHODS)
def test_bind_and_merge_accept_the_full_tree_and_leave_it_alone(name):
    method, params = METHODS[name], model_params()
    before = jax.tree.map(np.array, params)
    trainable, frozen = method.init(jax.random.key(3), params)
    trainable = random_like(trainable, 4)
    from_holes, from_full = method.merge(trainable, frozen), method.merge(trainable, params)
    jax.tree.map(np.testing.assert_array_equal, from_holes, from_full)
    bound = [method.bind(trainable, tree) for tree in (frozen, params)]
    np.testing.assert_array_equal(*(lj.lift(apply)(tree, X) for tree in bound))
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("name", METHODS)
def test_frozen_holds_nothing_that_trains_whole(name):
    method, params = METHODS[name], model_params()
    trainable, frozen = method.init(jax.random.key(3), params)
    whole = {path for path, entry in trainable.items() if "value" in entry}
    kept = {path for path, leaf in trees.flatten(frozen).items() if trees.is_array(leaf)}
    assert kept == set(trees.flatten(params).paths) - whole


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_true_exactly_where_it_trains(name):
    method, params = METHODS[name], model_params()
    trainable, frozen = method.init(jax.random.key(3), params)
    one = method.bind(trainable, frozen)
    mask = method.mask(one)
    assert jax.tree.structure(mask) == jax.tree.structure(one)
    chosen = sum(
        leaf.size for leaf, m in zip(jax.tree.leaves(one), jax.tree.leaves(mask), strict=True) if m
    )
    assert chosen == sum(leaf.size for leaf in jax.tree.leaves(trainable))
    on_params = dict(trees.flatten(method.mask(params)).items())
    assert {path for path, m in on_params.items() if m} == {
        path for path, entry in trainable.items() if "value" in entry
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_table_counts_what_init_makes(name):
    method, params = METHODS[name], model_params()
    trainable, _ = method.init(jax.random.key(3), params)
    table = method.table(params)
    assert [row.path for row in table] == [p for p in trees.flatten(params).paths if p in trainable]
    for row in table:
        assert row.num_trainable == sum(leaf.size for leaf in trainable[row.path].values())
        assert row.path in str(table)
    assert table.num_trainable == sum(leaf.size for leaf in jax.tree.leaves(trainable))


def test_parameter_counts_are_the_papers():
    """GPT-2 M and L, {q, v} at r = 4: 393,216 and 737,280; RoBERTa-base r = 8: 294,912."""
    for layers, width, rank, expected in ((24, 1024, 4, 393216), (36, 1280, 4, 737280),
                                          (12, 768, 8, 294912)):  # fmt: skip
        kernel = jax.ShapeDtypeStruct((width, width), jnp.float32)
        params = {f"{n}/{m}/kernel": kernel for n in range(layers) for m in "qkvo"}
        method = lj.LoRA(targets=r".*/[qv]/kernel", rank=rank, alpha=1.0)
        assert method.table(params).num_trainable == expected


def test_first_matching_rule_wins_and_overrides_rank_alpha_and_dropout():
    rules = [
        lj.Rule("layers/0/query/kernel", rank=1, alpha=5.0),
        lj.Rule(".*/kernel", rank=3, alpha=6.0),
    ]
    rows = {row.path: row for row in lj.LoRA(rules=rules).table(model_params())}
    assert (rows["layers/0/query/kernel"].rank, rows["layers/0/query/kernel"].scale) == (1, 5.0)
    assert {rows[p].rank for p in rows if p != "layers/0/query/kernel"} == {3}
    assert rows["head/kernel"].scale == 2.0


def test_the_draw_of_a_depends_on_its_path_alone_and_pads():
    params, key = model_params(), jax.random.key(5)
    path = "layers/0/query/kernel"
    few, _ = lj.LoRA(targets=path, rank=2).init(key, params)
    many, _ = lj.LoRA(targets=".*/kernel", rank=3).init(key, params)
    assert np.array_equal(few[path]["a"], many[path]["a"][:, :2])
    other, _ = lj.LoRA(targets=path, rank=2).init(jax.random.key(6), params)
    assert not np.array_equal(few[path]["a"], other[path]["a"])


@pytest.mark.parametrize(("init", "std"), [("kaiming_uniform", 3**-0.5), ("gaussian", 1.0)])
def test_inits_have_their_standard_deviation_and_b_is_zero(init, std):
    params = {"w": jnp.zeros((400, 90))}
    trainable, _ = lj.LoRA(targets="w", rank=64, init=init).init(jax.random.key(0), params)
    a = np.asarray(trainable["w"]["a"], np.float64) * np.sqrt(400)
    assert abs(a.std() - std) < 0.02 * std
    assert abs(a.mean()) < 0.02
    assert not np.any(trainable["w"]["b"])
    if init == "kaiming_uniform":
        assert np.abs(a).max() <= 1.0


def test_adapters_of_low_precision_kernels_are_float32():
    trainable, _ = METHODS["lora"].init(jax.random.key(0), model_params(jnp.bfloat16))
    assert trainable["layers/0/query/kernel"]["a"].dtype == jnp.float32
    assert trainable["head/kernel"]["value"].dtype == jnp.bfloat16


def test_trainable_is_a_copy_that_may_be_donated():
    params = model_params()
    trainable, _ = lj.FullFineTuning().init(jax.random.key(0), params)
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(trainable)
    assert float(jnp.sum(params["head"]["kernel"])) == float(jnp.sum(params["head"]["kernel"]))


ERRORS = {
    "no match lists the nearest": (
        lambda: lj.LoRA(targets="layers/0/qury/kernel"), r"qury.*nearest: 'layers/0/query/kernel'",
    ),
    "rank 0": (lambda: lj.LoRA(targets="q", rank=0), r"rank is 0"),
    "rank not whole": (lambda: lj.LoRA(targets="q", rank=2.5), r"rank is 2.5"),
    "rank above the matrix": (
        lambda: lj.LoRA(targets=".*/kernel", rank=7), r"rank 7 is above the full rank \d of '.*'",
    ),
    "alpha": (lambda: lj.LoRA(targets="q", alpha=-1.0), r"alpha is -1.0"),
    "dropout": (lambda: lj.LoRA(targets="q", dropout=1.0), r"dropout is 1.0"),
    "init": (lambda: lj.LoRA(targets="q", init="gausian"), r"'gausian'; nearest: 'gaussian'"),
    "unknown setting": (lambda: lj.LoRA(targets="q", rnak=2), r"'rnak'; nearest: 'rank'"),
    "unknown alias": (
        lambda: lj.LoRA(targets="q,w", aliases=ALIASES), r"'w' in 'q,w' is no alias.*'q'",
    ),
    "bad expression": (lambda: lj.LoRA(targets="layers/(q"), r"not a regular expression"),
    "train matches nothing": (
        lambda: lj.LoRA(targets=".*/kernel", train="haed/.*"), r"train='haed/\.\*'.*nearest: 'head",
    ),
    "only vectors": (lambda: lj.LoRA(targets=".*/bias"), r"cannot hold an adapter"),
    "shadowed": (
        lambda: lj.LoRA(rules=[lj.Rule(".*/kernel"), lj.Rule("head/kernel")]), r"comes too late",
    ),
    "no rules": (lambda: lj.LoRA(rules=[]), r"rules is empty"),
    "both": (lambda: lj.LoRA(targets="q", rules=[lj.Rule("q")]), r"either targets"),
    "settings beside rules": (lambda: lj.LoRA(rules=[lj.Rule("q")], rank=2), r"'rank' belongs"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_requests_name_the_value_and_the_way_out(name):
    make, message = ERRORS[name]
    with pytest.raises(lj.RequestError, match=message):
        make().init(jax.random.key(0), model_params())


def test_binding_another_methods_adapter_is_refused():
    params = model_params()
    trainable, frozen = METHODS["lora"].init(jax.random.key(0), params)
    with pytest.raises(lj.RequestError, match="no rule of this method"):
        lj.LoRA(targets="head/kernel", rank=1).bind(trainable, frozen)
    with pytest.raises(lj.RequestError, match="HeadOnly has no adapters"):
        lj.HeadOnly().bind(trainable, frozen)
    with pytest.raises(lj.RequestError, match=r"no parameter in this tree; nearest"):
        METHODS["lora"].bind(trainable, {"head": params["head"]})
    with pytest.raises(lj.RequestError, match="is a hole"):
        METHODS["lora"].bind({}, frozen)


def test_a_table_has_layers_in_the_order_of_their_numbers():
    params = {"layers": {str(n): {"w": jnp.ones((4, 4))} for n in range(12)}}
    params |= {f"block_{n}": {"w": jnp.ones((4, 4))} for n in range(11)}
    rows = [row.path for row in lj.LoRA(targets=".*", rank=1).table(params)]
    blocks = [f"block_{n}/w" for n in range(11)]
    assert rows == [*blocks, *(f"layers/{n}/w" for n in range(12))]
    shown = str(lj.LoRA(targets=".*", rank=1).table(params))
    assert shown.index("layers/2/w") < shown.index("layers/10/w")
