"""What rules can say: slices, layers, exclusions, inits; rows and several methods beside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core import trees
from lora_jax.methods.registry import method_of
from tests.core.adapted import random_like
from tests.methods.test_methods import X, model_params
from tests.methods.variants import AXES, TARGETS, trained
from tests.methods.variants import X as X2
from tests.methods.variants import apply as apply2
from tests.methods.variants import params_of as params2

KEY = jax.random.key(0)


def names(method, params=None):
    return list(method.init(KEY, params or model_params())[0])


def test_layers_and_exclusions_narrow_a_rule():
    assert names(lj.LoRA(targets=".*/kernel", rank=1, layers=[1])) == [
        "layers/1/query/kernel",
        "layers/1/value/kernel",
    ]
    assert names(lj.LoRA(targets=".*/kernel", rank=1, exclude="head/.*|.*/value/.*")) == [
        "layers/0/query/kernel",
        "layers/1/query/kernel",
    ]
    rules = [
        lj.Rule(".*/kernel", rank=1, layers=0),
        lj.Rule(".*/kernel", rank=3, init="orthogonal", exclude="head/.*"),
    ]
    rows = {row.path: row.rank for row in lj.LoRA(rules=rules).table(model_params())}
    assert rows == {f"layers/{n}/{m}/kernel": 1 + 2 * n for n in (0, 1) for m in ("query", "value")}


def from_config(rules, name="lora", **beside):
    settings = {"targets": "ignored", "rank": 3, "alpha": 6.0, "rules": rules, **beside}
    return method_of(name, settings, axes=None, aliases={"q": ".*/query/kernel"})


def test_a_config_holds_rules_as_plain_mappings():
    """What a rule does not say is what stands beside it."""
    rules = [{"targets": "q", "layers": [0]}, {"targets": ".*/value/kernel", "rank": 1}]
    expected = [
        lj.Rule("q", rank=3, alpha=6.0, layers=[0]),
        lj.Rule(".*/value/kernel", rank=1, alpha=6.0),
    ]
    assert list(from_config(rules).rules) == expected
    assert list(from_config(expected).rules) == expected
    assert [row.rank for row in from_config(rules).table(model_params())] == [3, 1, 1]
    for bad, message in (
        ([{"rank": 2}], "names no targets"),
        ([{"targets": "q", "ranks": 2}], "has no 'ranks'.*'rank'"),
        (["q"], "holds 'q'; each rule is a mapping"),
    ):
        with pytest.raises(lj.RequestError, match=message):
            from_config(bad)
    with pytest.raises(lj.RequestError, match="VeRA has no alpha"):
        from_config([{"targets": "q", "alpha": 2.0}], name="vera")


FUSED = {"c_attn": jax.random.normal(KEY, (6, 24)), "o": jnp.ones((8, 3))}


def fused(params, x):
    q, k, v = jnp.split(x @ params["c_attn"], 3, axis=-1)
    return jax.nn.softmax(q @ k.T / 3) @ v @ params["o"]


def test_slices_of_a_fused_kernel_have_adapters_of_their_own_and_leave_the_rest_alone():
    """q and v of GPT-2's c_attn, as the paper adapts them."""
    rules = [
        lj.Rule("c_attn", rank=2, alpha=2.0, slice=(-1, 0, 8)),
        lj.Rule("c_attn", rank=1, alpha=3.0, slice=(-1, 16, 24)),
    ]
    method = lj.LoRA(rules=rules, train="o")
    trainable, frozen = method.init(KEY, FUSED)
    assert {n: jax.tree.map(jnp.shape, e) for n, e in trainable.items() if n != "o"} == {
        "c_attn[-1,0:8]": {"a": (6, 2), "b": (2, 8)},
        "c_attn[-1,16:24]": {"a": (6, 1), "b": (1, 8)},
    }
    trainable = random_like(trainable, 2)
    merged = method.merge(trainable, frozen)
    w = np.asarray(FUSED["c_attn"], np.float64).copy()
    for name, scale, where in (
        ("c_attn[-1,0:8]", 1.0, slice(0, 8)),
        ("c_attn[-1,16:24]", 3.0, slice(16, 24)),
    ):
        a, b = (np.asarray(trainable[name][part], np.float64) for part in "ab")
        w[:, where] += scale * a @ b
    np.testing.assert_allclose(merged["c_attn"], w, atol=1e-6)
    assert np.array_equal(merged["c_attn"][:, 8:16], FUSED["c_attn"][:, 8:16])
    with lj.watch_materialised() as events:
        out = lj.lift(fused)(method.bind(trainable, frozen), X)
    assert not events
    np.testing.assert_allclose(out, fused(merged, X), atol=1e-5)
    # What the paper counts: r (in + out) for each.
    assert method.table(FUSED).num_trainable - FUSED["o"].size == 2 * (6 + 8) + 1 * (6 + 8)


def test_rows_of_a_table_train_and_the_others_stay():
    """New tokens: their rows move, at the lookup and at the tied head."""
    method = lj.LoRA(targets="plain", rank=2, rows={"table": (2, 5)}, axes=AXES)
    params, trainable, frozen = trained(method)
    assert trainable["table[rows]"]["rows"].shape == (2, 6)
    merged = method.merge(trainable, frozen)
    np.testing.assert_allclose(
        merged["table"][jnp.array([2, 5])], trainable["table[rows]"]["rows"], atol=1e-6
    )
    others = jnp.array([0, 1, 3, 4, 6])
    assert np.array_equal(merged["table"][others], params["table"][others])
    with lj.watch_materialised() as events:
        out = lj.lift(apply2)(method.bind(trainable, frozen), X2)
    assert not events
    np.testing.assert_allclose(out, apply2(merged, X2), atol=1e-5)
    start, _ = method.init(KEY, params)
    fresh = jax.jit(lj.lift(apply2))(method.bind(start, frozen), X2)
    assert np.array_equal(fresh, jax.jit(apply2)(params, X2))
    assert {row.path: row.num_trainable for row in method.table(params)}["table[rows]"] == 12


def test_rows_and_an_adapter_on_one_table_add_up():
    method = lj.LoRA(targets="table", rank=2, alpha=2.0, rows={"table": (2, 5)}, axes=AXES)
    params, trainable, frozen = trained(method)
    merged = method.merge(trainable, frozen)["table"]
    expected = np.asarray(params["table"], np.float64).copy()
    expected[[2, 5]] = trainable["table[rows]"]["rows"]
    expected += np.asarray(trainable["table"]["a"], np.float64) @ np.asarray(
        trainable["table"]["b"]
    )
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_tied_parameters_are_one_leaf_and_one_array_at_two_leaves_is_refused():
    table = jax.random.normal(KEY, (6, 6))
    tied = {"embed": table, "head": table}
    for method in (lj.LoRA(targets="embed", rank=1), lj.FullFineTuning()):
        with pytest.raises(lj.RequestError, match="'embed' and 'head' are one array"):
            method.init(KEY, tied)
    lj.LoRA(targets="embed", rank=1).init(KEY, {"embed": table, "head": jnp.copy(table)})
    method = lj.LoRA(targets="w", rank=1)
    trainable, frozen = method.init(KEY, {"w": table, "b": jnp.zeros(6)})
    assert len(jax.tree.leaves(method.merge(trainable, frozen))) == 2


def test_several_adapters_on_one_weight_each_with_its_scale():
    first = lj.LoRA(targets=TARGETS, rank=2, alpha=3.0, axes=AXES)
    second = lj.RsLoRA(targets="plain|table", rank=3, alpha=2.0, axes=AXES)
    params, one, _ = trained(first)
    _, two, _ = trained(second, seed=8)
    adapters = [(first, one), (second, two)]
    merged = lj.merge_all(adapters, params)
    for name in params:
        base = np.asarray(params[name], np.float64)
        changes = [np.asarray(m.merge(t, params)[name], np.float64) - base for m, t in adapters]
        np.testing.assert_allclose(merged[name], base + sum(changes), atol=2e-6)
    with lj.watch_materialised() as events:
        out = lj.lift(apply2)(lj.bind_all(adapters, params), X2)
    assert not events
    np.testing.assert_allclose(out, apply2(merged, X2), atol=1e-5)
    swapped = lj.lift(apply2)(lj.bind_all(adapters[::-1], params), X2)
    np.testing.assert_allclose(out, swapped, atol=1e-5)

    def loss(adapters):
        return jnp.mean(lj.lift(apply2)(lj.bind_all(adapters, params), X2) ** 2)

    grads = jax.grad(lambda t: loss([(first, t[0]), (second, t[1])]))((one, two))
    for found, method, tree in zip(grads, (first, second), (one, two), strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(tree), method


def test_methods_combined_train_as_one_and_may_not_overlap():
    method = lj.Combined(
        [
            lj.DoRA(targets="plain", rank=2, axes=AXES),
            lj.LoRAFA(targets="heads|table", rank=2, axes=AXES, train="head"),
        ]
    )
    params, trainable, frozen = trained(method)
    assert set(trainable) == {"plain", "heads", "table", "head"}
    merged = method.merge(trainable, frozen)
    np.testing.assert_allclose(
        lj.lift(apply2)(method.bind(trainable, frozen), X2), apply2(merged, X2), atol=1e-5
    )
    import optax

    tx = method.optimizer(optax.adamw(1e-2, weight_decay=0.5))
    loss = lambda t: jnp.mean(lj.lift(apply2)(method.bind(t, frozen), X2) ** 2)  # noqa: E731
    updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
    moved = optax.apply_updates(trainable, updates)
    for name, entry in trainable.items():
        for part, before in entry.items():
            fixed = name in ("heads", "table") and part == "a"
            assert np.array_equal(before, moved[name][part]) == fixed, (name, part)
    assert {row.path for row in method.table(params)} == set(trainable)
    overlapping = lj.Combined([lj.LoRA(targets="plain", rank=1), lj.DoRA(targets="pl.*", rank=1)])
    with pytest.raises(lj.RequestError, match="'plain' is taken by rules of LoRA and of DoRA"):
        overlapping.init(KEY, params2())


def test_methods_share_a_fused_kernel_by_slices():
    """LoRA on q and DoRA on v: side by side in one method, or bound one after the other."""
    q, v = (-1, 0, 8), (-1, 16, 24)
    lora = lj.LoRA(targets="c_attn", rank=2, slice=q, rows={"o": (1,)})
    dora = lj.DoRA(targets="c_attn", rank=2, slice=v, rows={"table": (2, 3)})
    params = {**FUSED, "table": jnp.ones((4, 2))}
    both = lj.Combined([lora, dora])
    trainable, frozen = both.init(KEY, params)
    trainable = random_like(trainable, 5)
    merged = both.merge(trainable, frozen)
    alone = [
        m.merge({name: trainable[name] for name in m.init(KEY, params)[0]}, params)
        for m in (lora, dora)
    ]
    np.testing.assert_allclose(merged["c_attn"][:, :8], alone[0]["c_attn"][:, :8], atol=1e-5)
    np.testing.assert_allclose(merged["c_attn"][:, 16:], alone[1]["c_attn"][:, 16:], atol=1e-5)
    assert np.array_equal(merged["c_attn"][:, 8:16], params["c_attn"][:, 8:16])
    np.testing.assert_allclose(merged["table"], alone[1]["table"], atol=1e-6)
    trees = [m.init(KEY, params)[0] for m in (lora, dora)]
    lj.bind_all([(lora, trees[0]), (dora, trees[1])], params)
    over = lj.DoRA(targets="c_attn", rank=1, slice=(-1, 4, 12))
    with pytest.raises(lj.RequestError, match="bind DoRA first"):
        lj.bind_all([(lora, trees[0]), (over, over.init(KEY, params)[0])], params)
    for use in (lambda m: m.init(KEY, params), lambda m: m.table(params)):
        with pytest.raises(lj.RequestError, match="taken by rules of LoRA and of DoRA.*a slice"):
            use(lj.Combined([lora, over]))


def test_names_with_brackets_and_numpy_numbers_are_fine():
    params = {"w[0]": jnp.ones((6, 4)), "w[1]": jnp.ones((6, 4))}
    method = lj.LoRA(
        targets=r"w\[.\]", rank=np.int64(2), alpha=np.float32(4), slice=(-1, np.int32(0), 2)
    )
    trainable, frozen = method.init(KEY, params)
    assert set(trainable) == {"w[0][-1,0:2]", "w[1][-1,0:2]"}
    assert method.bind(trainable, frozen)["w[1]"].path == "w[1]"


def biases_only(method):
    params = model_params()
    trainable, frozen = method.init(KEY, params)
    return trainable, method.merge(random_like(trainable, 3), frozen), params


def test_biases_train_beside_the_adapters():
    trainable, merged, params = biases_only(
        lj.LoRA(targets="layers/0/.*/kernel", rank=1, train=(".*/bias", "head/.*"))
    )
    assert sum("value" in entry for entry in trainable.values()) == 6
    moved = {
        path
        for path, leaf in trees.flatten(merged).items()
        if not np.array_equal(leaf, dict(trees.flatten(params).items())[path])
    }
    assert moved == set(trainable)


ERRORS = {
    "slice outside the kernel": (
        lambda: lj.LoRA(targets="c_attn", rank=1, slice=(-1, 16, 32)),
        r"slice \(-1, 16, 32\) is outside of 'c_attn' \(6, 24\)",
    ),
    "slice of no axis": (
        lambda: lj.LoRA(targets="c_attn", rank=1, slice=(-3, 0, 2)), r"outside of 'c_attn'",
    ),
    "slice from the front": (
        lambda: lj.LoRA(targets="c_attn", rank=1, slice=(1, 0, 8)), r"axis counts from the end",
    ),
    "slice of nothing": (
        lambda: lj.LoRA(targets="c_attn", rank=1, slice=(-1, 8, 8)), r"0 <= start < stop",
    ),
    "slice in words": (
        lambda: lj.LoRA(targets="c_attn", rank=1, slice="q"), r"must be \(axis, start, stop\)",
    ),
    "rank above the slice": (
        lambda: lj.LoRA(targets="c_attn", rank=3, slice=(-1, 0, 2)),
        r"rank 3 is above the full rank 2 of 'c_attn\[-1,0:2\]'",
    ),
    "slices overlap": (
        lambda: lj.LoRA(rules=[lj.Rule("c_attn", rank=1, slice=(-1, 0, 9)),
                               lj.Rule("c_attn", rank=1, slice=(-1, 8, 24))]),
        r"slices \(-1, 0, 9\) and \(-1, 8, 24\) of 'c_attn' overlap",
    ),
    "slices of two axes": (
        lambda: lj.LoRA(rules=[lj.Rule("c_attn", rank=1, slice=(-1, 0, 9)),
                               lj.Rule("c_attn", rank=1, slice=(-2, 0, 3))]),
        r"overlap; let each rule",
    ),
    "slice in fractions": (
        lambda: lj.LoRA(targets="c_attn", rank=1, slice=(-1, 0.5, 8)), r"slice is \(-1, 0.5, 8\)",
    ),
    "slice of a stack": (
        lambda: lj.LoRA(targets="s", rank=1, slice=(-3, 0, 1),
                        axes={"s": lj.KernelAxes((-3,), (-2,), (-1,))}),
        r"slice \(-3, 0, 1\) of 's' \(2, 4, 4\) is along an axis of stacked matrices",
    ),
    "a target of several": (
        lambda: lj.LoRA(targets=["c_attn", "c_proj"], rank=1), r"targets='c_proj' matches no.*near",
    ),
    "an exclusion of nothing": (
        lambda: lj.LoRA(targets="c_attn|o", rank=1, exclude=["o", "0"]), r"exclude='0' matches no",
    ),
    "one of the parameters trained whole": (
        lambda: lj.LoRA(targets="c_attn", rank=1, train=("o", "bias")), r"train='bias' matches no",
    ),
    "one of the layers": (
        lambda: lj.LoRA(targets="h/.*", rank=1, layers=(0, 7)), r"no layer 7; .* are \[0, 1\]",
    ),
    "axes of nothing": (
        lambda: lj.LoRA(targets="c_attn", rank=1, axes={"q": lj.KernelAxes((), (0,), (1,))}),
        r"axes= names 'q', which is no parameter",
    ),
    "rows and whole": (
        lambda: lj.LoRA(targets="o", rank=1, train="c_attn", rows={"c_attn": (1,)}),
        r"'c_attn' is trained whole \(train=\) and by rows",
    ),
    "rows named in two": (
        lambda: lj.LoRA(targets="o", rank=1, rows={"c_attn": (1,), "c_.*": (2,)}),
        r"two entries of rows= name 'c_attn'",
    ),
    "rows as a number": (
        lambda: lj.LoRA(targets="o", rank=1, rows={"c_attn": 3}), r"are 3; they must be a list",
    ),
    "a complex kernel": (lambda: lj.LoRA(targets="z", rank=1), r"only what cannot hold an adapter"),
    "alpha in words": (lambda: lj.LoRA(targets="o", alpha="8"), r"alpha is '8'"),
    "dropout in words": (lambda: lj.LoRA(targets="o", dropout="a"), r"dropout is 'a'"),
    "a rule that is a mapping": (
        lambda: lj.LoRA(rules=[{"targets": "o"}]), r"each must be a lora_jax.Rule",
    ),
    "negative rank": (lambda: lj.LoRA(targets="c_attn", rank=-1), r"rank is -1"),
    "layers that are not there": (
        lambda: lj.LoRA(targets="c_attn", rank=1, layers=(3,)),
        r"layers=\(3,\).*no key of its path is a whole number",
    ),
    "layers in words": (lambda: lj.LoRA(targets="c_attn", layers="all"), r"layers is 'all'"),
    "rows outside": (
        lambda: lj.LoRA(targets="o", rank=1, rows={"c_attn": (6,)}), r"6 is outside of",
    ),
    "rows twice": (lambda: lj.LoRA(targets="o", rank=1, rows={"c_attn": (1, 1)}), r"stands twice"),
    "rows of nothing": (
        lambda: lj.LoRA(targets="o", rank=1, rows={"x": (1,)}), r"rows='x' matches no",
    ),
}  # fmt: skip

# What the requests above are made of: a fused kernel, a stack, layers, and a complex kernel.
MORE = {
    **FUSED,
    "h": {"0": jnp.ones((4, 4)), "1": jnp.ones((4, 4))},
    "s": jnp.ones((2, 4, 4)),
    "z": jnp.ones((4, 4), jnp.complex64),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_rules_name_the_value_and_the_way_out(name):
    make, message = ERRORS[name]
    with pytest.raises(lj.RequestError, match=message):
        make().init(KEY, MORE)


def test_tied_numpy_arrays_are_noticed_too():
    table = np.ones((6, 6), np.float32)
    with pytest.raises(lj.RequestError, match="'embed' and 'head' are one array"):
        lj.LoRA(targets="embed", rank=1).init(KEY, {"embed": table, "head": table})


def test_an_adapter_of_other_experts_or_shapes_is_refused():
    kernel = jnp.ones((4, 6, 5))
    axes = {"w": lj.KernelAxes((-3,), (-2,), (-1,))}
    method = lj.LoRA(targets="w", rank=2, axes=axes)
    trainable, _ = method.init(KEY, {"w": kernel})
    with pytest.raises(lj.RequestError, match=r"for \(4,\) stacked matrices.*has \(8,\)"):
        method.bind(trainable, {"w": jnp.ones((8, 6, 5))})
    with pytest.raises(lj.RequestError, match=r"a of the adapter of 'w' is .* needs \(4, 7, 2\)"):
        method.bind(trainable, {"w": jnp.ones((4, 7, 5))})
    with pytest.raises(lj.RequestError, match="holds .*'a', 'b'.*DoRA has"):
        lj.DoRA(targets="w", rank=2, axes=axes).bind(trainable, {"w": kernel})


def test_groups_that_do_not_divide_a_kernels_outputs_are_told_at_the_models_line():
    def grouped(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )  # fmt: skip

    axes = {"w": lj.KernelAxes((), (-3, -2), (-1,))}
    method = lj.LoRA(targets="w", rank=1, axes=axes)
    trainable, frozen = method.init(KEY, {"w": jnp.ones((3, 2, 5))})
    with pytest.raises(ValueError, match="multiple of feature_group_count, but 5 is not.* of 2"):
        lj.lift(grouped)(method.bind(trainable, frozen), jnp.ones((1, 8, 4)))


def test_what_cannot_be_merged_bound_or_drawn_is_refused():
    method = lj.LoRA(targets="c_attn", rank=2, dropout=0.1)
    trainable, frozen = method.init(KEY, FUSED)
    with pytest.raises(lj.RequestError, match="'c_attn' holds int8"):
        method.merge(trainable, {**FUSED, "c_attn": FUSED["c_attn"].astype(jnp.int8)})
    with pytest.raises(lj.RequestError, match="has dropout=0.1 and no key was given"):
        method.bind(trainable, frozen, training=True)
    method.bind(trainable, frozen, training=True, key=KEY)
    whole = lj.LoRA(targets="o", rank=2, train="c_attn")
    with pytest.raises(lj.RequestError, match="trained whole by one"):
        lj.bind_all([(method, trainable), (whole, whole.init(KEY, FUSED)[0])], FUSED)
    dora = lj.DoRA(targets="c_attn", rank=1)
    with pytest.raises(lj.RequestError, match="bind DoRA first"):
        lj.bind_all([(method, trainable), (dora, dora.init(KEY, FUSED)[0])], FUSED)
    lj.bind_all([(dora, dora.init(KEY, FUSED)[0]), (method, trainable)], FUSED)
    with pytest.raises(lj.RequestError, match="Combined takes two"):
        lj.Combined([method])
    with pytest.raises(lj.RequestError, match="at least one"):
        lj.bind_all([], FUSED)
