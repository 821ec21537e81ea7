"""Adapter arithmetic: what comes out is compared as ΔW, in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.arithmetic import Adapter, combine, compress, difference, negate, to_lora
from tests.methods.test_variants import VARIANTS, few_fast
from tests.methods.variants import AXES, TARGETS, X, apply, matrices, params_of, trained

LORA = lj.LoRA(targets=TARGETS, rank=2, alpha=3.0, axes=AXES, train="head")


def adapter_of(method=LORA, seed=3):
    params, trainable, _ = trained(method, seed)
    return Adapter(method, trainable, params)


def deltas(adapter):
    """`{path: ΔW}` in float64: what merging changes."""
    merged = adapter.merge()
    return {
        path: np.asarray(merged[path], np.float64) - np.asarray(kernel, np.float64)
        for path, kernel in adapter.params.items()
    }


def assert_deltas(adapter, expected, atol=1e-5):
    for path, delta in deltas(adapter).items():
        np.testing.assert_allclose(delta, expected[path], atol=atol, err_msg=path)


@pytest.mark.parametrize("name", few_fast("pissa", "dora", "vera", without=["bottleneck"]))
def test_weight_one_is_the_identity_for_every_variant(name):
    adapter = adapter_of(VARIANTS[name])
    assert combine([adapter], [1.0]) is adapter
    if name != "dora":
        assert_deltas(to_lora(adapter), deltas(adapter))
        assert type(to_lora(adapter).method) is lj.LoRA


@pytest.mark.parametrize("name", few_fast("pissa", without=["dora", "bottleneck"]))  # refused
def test_weighted_sums_are_exact_and_ranks_add(name):
    one, other = adapter_of(VARIANTS[name]), adapter_of(LORA, seed=4)
    if name == "vera":
        one = adapter_of(lj.VeRA(targets=TARGETS, rank=2, axes=AXES, train="head"))
    found = combine([one, other, one], [0.5, -2.0, 0.25])
    pairs = zip(deltas(one).items(), deltas(other).values(), strict=True)
    assert_deltas(found, {path: 0.75 * d - 2.0 * e for (path, d), e in pairs})
    rank = 2 * {"pissa": 4, "lora_xs": 3}.get(name, 2) + 2
    ranks = {row.path: row.rank for row in found.method.table(found.params) if row.rank}
    full = {"plain": 6, "stacked": 8, "heads": 6, "table": 6}
    assert ranks == {path: min(rank, full[path]) for path in full}


def test_a_pissa_exports_to_lora_of_twice_the_rank():
    adapter = adapter_of(VARIANTS["pissa"])
    plain = to_lora(adapter)
    assert {row.rank for row in plain.method.table(plain.params)} == {4, None}
    found, expected = (
        jax.jit(lj.lift(apply))(x.method.bind(x.trainable, x.params), X) for x in (plain, adapter)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_negation_undoes():
    adapter = adapter_of()
    both = combine([adapter, negate(adapter)], [1.0, 1.0])
    assert_deltas(both, {path: np.zeros_like(d) for path, d in deltas(adapter).items()})


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_compression_is_the_best_of_its_rank_and_says_its_error(rank):
    sum_of_two = combine([adapter_of(), adapter_of(seed=4)], [1.0, 1.0])
    found = compress(sum_of_two, rank)
    before, after = deltas(sum_of_two), deltas(found.adapter)
    total, left = 0.0, 0.0
    for name, error in found.errors.items():
        whole, kept = matrices(before[name], name), matrices(after[name], name)
        sigma = np.linalg.svd(whole, compute_uv=False)
        best = np.sqrt((sigma[:, rank:] ** 2).sum())
        np.testing.assert_allclose(np.linalg.norm(whole - kept), best, atol=2e-5)
        np.testing.assert_allclose(error, best / np.linalg.norm(whole), atol=1e-5)
        total, left = total + (whole**2).sum(), left + best**2
    np.testing.assert_allclose(found.error, np.sqrt(left / total), atol=1e-5)
    np.testing.assert_allclose(after["head"], before["head"], atol=1e-6)
    assert "relative error" in str(found)


def test_the_difference_of_a_merged_model_and_its_base_is_the_adapter():
    adapter = adapter_of()
    tuned = adapter.merge()
    settings = {"targets": TARGETS, "axes": AXES}
    found = difference(tuned, adapter.params, rank=2, train="head", **settings)
    assert found.error < 1e-5 and not found.left_out
    assert_deltas(found.adapter, deltas(adapter))
    less = difference(tuned, adapter.params, rank=1, **settings)
    assert less.left_out == ("head",) and "left out: head" in str(less)
    assert 0.01 < less.error < 1


def test_dora_becomes_an_adapter_by_way_of_its_merged_model():
    adapter = adapter_of(VARIANTS["dora"])
    with pytest.raises(lj.RequestError, match="DoRA makes to .* not low-rank.*difference"):
        combine([adapter], [0.5])
    some = {"targets": "plain|heads|table", "train": "head|stacked"}
    full = difference(adapter.merge(), adapter.params, rank=6, axes=AXES, **some)
    assert full.error < 1e-5
    assert_deltas(full.adapter, deltas(adapter))


def test_rows_and_slices_are_summed_too():
    rules = [lj.Rule("plain", rank=2, slice=(-1, 0, 4)), lj.Rule("plain", rank=1, slice=(-1, 6, 8))]
    method = lj.LoRA(rules=rules, rows={"table": (1, 4)})
    one, other = adapter_of(method), adapter_of(method, seed=4)
    found = combine([one, other], [2.0, -1.0])
    pairs = zip(deltas(one).items(), deltas(other).values(), strict=True)
    assert_deltas(found, {path: 2.0 * d - e for (path, d), e in pairs})
    apart = adapter_of(lj.LoRA(rules=rules, rows={"table": (1, 5)}), seed=5)
    both = combine([one, apart], [0.5, 3.0])
    pairs = zip(deltas(one).items(), deltas(apart).values(), strict=True)
    assert_deltas(both, {path: 0.5 * d + 3.0 * e for (path, d), e in pairs})
    assert set(both.method.rows.values()) == {(1, 4, 5)}
    smaller = compress(both, 1).adapter
    assert np.allclose(deltas(smaller)["table"], deltas(both)["table"], atol=1e-6)


MEETING = {
    "adapted and whole": (lj.LoRA(targets="plain", rank=2), lj.HeadOnly(train="plain")),
    "rows and whole": (
        lj.HeadOnly(train="head", rows={"table": (1, 4)}), lj.HeadOnly(train="table"),
    ),
    "a slice and the whole kernel": (
        lj.LoRA(targets="plain", rank=2, slice=(-1, 2, 7)), lj.LoRA(targets="plain", rank=1),
    ),
    "slices that overlap": (
        lj.LoRA(targets="plain", rank=2, slice=(-1, 2, 7)),
        lj.LoRA(targets="plain", rank=2, slice=(-2, 0, 3)),
    ),
    "slices of the heads": (
        lj.LoRA(targets="heads", rank=2, slice=(-2, 0, 1), axes=AXES),
        lj.LoRA(targets="heads", rank=1, slice=(-2, 0, 2), axes=AXES),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEETING)
def test_what_meets_on_one_parameter_is_summed_whatever_form_it_has(name):
    first, second = (adapter_of(method, seed) for seed, method in enumerate(MEETING[name]))
    for pair in ((first, second), (second, first)):
        found = combine(pair, [2.0, -0.5])
        changes = zip(deltas(pair[0]).items(), deltas(pair[1]).values(), strict=True)
        assert_deltas(found, {path: 2.0 * d - 0.5 * e for (path, d), e in changes})
        assert found.method.table(found.params).num_trainable > 0


def test_whole_parameters_of_low_precision_are_rounded_once():
    base = {"w": jnp.full((4, 4), 1.0, jnp.bfloat16)}
    one = Adapter(
        lj.FullFineTuning(), {"w": {"value": jnp.full((4, 4), 1.0078125, jnp.bfloat16)}}, base
    )
    eighths = combine([one] * 8, [0.125] * 8)
    assert eighths.trainable["w"]["value"].dtype == jnp.bfloat16
    # One eighth of the last bit, eight times: rounded each time, it would never move.
    assert np.all(eighths.trainable["w"]["value"] == one.trainable["w"]["value"])
    assert to_lora(one).trainable["w"]["value"] is one.trainable["w"]["value"]


def test_changes_that_cancel_compress_to_nothing():
    adapter = adapter_of(lj.LoRA(targets="plain", rank=2))
    nothing = combine([adapter, adapter], [1.0, -1.0])
    found = compress(nothing, 1)
    assert found.error == 0 and set(found.errors.values()) == {0}
    assert not np.any(deltas(found.adapter)["plain"])


def test_adapters_of_different_bases_and_other_impossible_sums_are_refused():
    params = {**params_of(), "plain": jnp.zeros((6, 8))}
    stranger = Adapter(LORA, trained(LORA)[1], params)
    with pytest.raises(lj.RequestError, match="different bases"):
        combine([adapter_of(), stranger], [1.0, 1.0])
    with pytest.raises(lj.RequestError, match="one weight for each"):
        combine([adapter_of()], [1.0, 2.0])
    with pytest.raises(lj.RequestError, match="weight nan"):
        combine([adapter_of()], [float("nan")])
    for rank in (0, 3, 2.0):
        with pytest.raises(lj.RequestError, match="from 1 to 2"):
            compress(adapter_of(), rank)
    with pytest.raises(lj.RequestError, match="HeadOnly has no low-rank part"):
        compress(adapter_of(lj.HeadOnly(train="head")), 1)
    params, trainable, frozen = trained(LORA)
    with pytest.raises(lj.RequestError, match="a hole at 'head'; give the base's full tree"):
        Adapter(LORA, trainable, frozen)
    with pytest.raises(lj.RequestError, match="an adapter at 'heads'"):
        Adapter(LORA, trainable, LORA.bind(trainable, params))
    broken = {**params, "plain": params["plain"].at[0, 0].set(jnp.nan)}
    with pytest.raises(lj.RequestError, match="'plain' of the tuned model holds NaN"):
        difference(broken, params, targets="plain", rank=1)
    with pytest.raises(lj.RequestError, match="differ at 'plain'"):
        difference({**params_of(), "plain": jnp.ones((5, 8))}, params_of(), targets="plain", rank=1)


def test_the_sum_trains_on_like_any_adapter():
    found = combine([adapter_of(), adapter_of(seed=4)], [0.5, 0.5])
    loss = lambda t: jnp.mean(lj.lift(apply)(found.method.bind(t, found.params), X) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(found.trainable)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
