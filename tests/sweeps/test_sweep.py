"""`lj.sweep` for anybody's model: what it takes, what it gives back, what it refuses."""

from __future__ import annotations

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.sweeps.api import sweep
from lora_jax.sweeps.pack import _pad
from lora_jax.sweeps.settings import read_cells
from tests.sweeps.problem import AXES, CELLS, VALIDATION, base, batches_of, logits, loss_fn


def test_plain_jax_in_a_few_lines():
    params = {"w1": jax.random.normal(jax.random.key(0), (4, 16)), "w2": jnp.ones((16, 1)) / 16}
    x = jax.random.normal(jax.random.key(1), (64, 4))

    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch @ params["w1"]) @ params["w2"] - batch[:, :1]) ** 2)

    cells = [{"targets": "w1", "rank": r, "lr": lr} for r in (1, 4) for lr in (1e-3, 3e-2)]
    results = lj.sweep(loss, params, [x], cells, num_steps=30, progress=False)
    table = results.to_pandas()
    assert list(table["rank"]) == [1, 1, 4, 4] and set(table["pack"]) == {1}
    assert results.best().settings["lr"] == 3e-2
    assert results.best().losses[-1] < 0.7 * results.best().losses[0]


def test_linen_in_a_few_lines():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(16)(x)))

    x = jax.random.normal(jax.random.key(1), (64, 4))
    params = Net().init(jax.random.key(0), x)
    loss = lambda params, batch: jnp.mean((Net().apply(params, batch) - batch[:, :1]) ** 2)  # noqa: E731
    cells = [{"targets": ".*/kernel", "rank": 1, "lr": lr} for lr in (1e-3, 3e-2)]
    results = lj.sweep(loss, params, [x], cells, num_steps=30, progress=False)
    assert results[1].losses[-1] < results[0].losses[-1] < results[0].losses[0]


def test_nnx_in_a_few_lines():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner, self.out = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.inner(x)))

    x = jax.random.normal(jax.random.key(1), (64, 4))
    loss = lambda model, batch: jnp.mean((model(batch) - batch[:, :1]) ** 2)  # noqa: E731
    cells = [{"targets": "inner/kernel", "rank": r, "lr": 3e-2, "train": "out/.*"} for r in (1, 2)]
    results = lj.sweep(loss, Net(nnx.Rngs(0)), [x], cells, num_steps=30, progress=False)
    assert all(row.losses[-1] < row.losses[0] for row in results)
    assert results["lora-inner/kernel-rank1-lr0.03-trainout/.*"].num_trainable == 4 + 16 + 16 + 1


@pytest.mark.slow
def test_methods_without_factors_stand_beside_in_packs_of_their_own():
    cells = [
        {"method": "head", "train": "head", "lr": 1e-2},
        {"method": "full", "lr": 1e-3},
        {"targets": "up", "rank": 2, "lr": 1e-2, "train": "head"},
        {"targets": "up", "rank": 9, "lr": 1e-2, "train": "head"},
    ]
    found = sweep(loss_fn, base(), batches_of(0), cells, num_steps=5, axes=AXES, progress=False)
    assert [row.pack for row in found] == [1, 2, 3, 4]
    assert not any(row.error for row in found)
    assert found[1].num_trainable == sum(leaf.size for leaf in jax.tree.leaves(base()))
    assert "padded to rank 9" in found.plan


@pytest.mark.slow
def test_a_memory_budget_narrows_the_packs():
    cells = [{**CELLS[0], "seed": seed} for seed in range(4)]
    arguments = {"num_steps": 3, "axes": AXES, "progress": False, "at_once": 0}
    wide = sweep(loss_fn, base(), batches_of(0), cells, **arguments)
    assert [row.width for row in wide] == [4] * 4
    needed = float(re.search(r"([\d.]+) MiB", wide.plan)[1]) * 2**20
    narrow = sweep(
        loss_fn, base(), batches_of(0), cells, memory_bytes=int(0.8 * needed), **arguments
    )
    assert [row.width for row in narrow] == [2] * 4 and [row.pack for row in narrow] == [1, 1, 2, 2]
    for x, y in zip(wide, narrow, strict=True):
        assert np.max(np.abs(x.losses - y.losses)) < 1e-5
    nothing = sweep(loss_fn, base(), batches_of(0), cells, memory_bytes=1000, **arguments)
    assert all("one cell alone needs" in row.error for row in nothing)


def test_a_later_pack_that_cannot_run_leaves_the_finished_ones():
    def batches(seed):
        return batches_of(seed, 3 if seed == 0 else 1)

    cells = [
        {"targets": "up", "rank": 2, "lr": 1e-2, "train": "head"},
        {"targets": "up", "rank": 9, "lr": 1e-2, "train": "head", "seed": 1},
    ]
    found = sweep(loss_fn, base(), batches, cells, num_steps=3, axes=AXES, progress=False)
    assert not found[0].error and len(found[0].losses) == 3
    assert "gave 1 batches" in found[1].error


def test_an_impossible_cell_says_why_and_the_others_run():
    cells = [*CELLS[:2], {"targets": "up", "rank": 13, "lr": 1e-3}, {"targets": "upp", "lr": 1e-3}]
    found = sweep(loss_fn, base(), batches_of(0), cells, num_steps=3, axes=AXES, progress=False)
    assert [bool(row.error) for row in found] == [False, False, True, True]
    assert "rank 13 is above the full rank 12 of 'up'" in found[2].error
    assert "matches no parameter" in found[3].error
    assert found[2].trainable is None
    assert list(found.to_pandas()["error"] != "") == [False, False, True, True]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([], "cells is empty"),
        ([CELLS[0], CELLS[0]], "same settings"),
        ([{**CELLS[0], "name": "a"}, {**CELLS[1], "name": "a"}], "named 'a'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(cells, words):
    with pytest.raises(lj.RequestError, match=words):
        sweep(loss_fn, base(), batches_of(0), cells, num_steps=3, axes=AXES, progress=False)


def test_methods_may_be_given_ready_and_nothing_may_stand_beside_them():
    ready = lj.LoRA(targets="up", rank=2, train="head")
    other = lj.LoRA(targets="layers", rank=2, train="head", axes=AXES)
    cells = [
        {"method": ready, "lr": 1e-2},
        {"method": other, "lr": 1e-2},
        {"method": ready, "rank": 4, "lr": 1e-2},
        {"method": lj.LoRA, "lr": 1e-2},
    ]
    found = sweep(loss_fn, base(), batches_of(0), cells, num_steps=3, progress=False)
    assert [row.pack for row in found] == [1, 1, 0, 0]
    assert [set(row.trainable) for row in found[:2]] == [{"up", "head"}, {"layers", "head"}]
    assert "'rank' is given with a ready method" in found[2].error
    assert "no Method made ready" in found[3].error


def test_cells_without_names_get_names_of_their_own():
    cells = [
        {"targets": "up", "rank": 2, "lr": 1e-3},
        {"targets": "up", "rank": 2, "lr": 1e-3, "train": "head"},
        {"targets": ("up",), "rank": 2, "lr": 1e-3},
        {"targets": "up", "rank": 2, "lr": 0.0010000001},
    ]
    assert len({cell.name for cell in read_cells(cells)}) == 4


def test_too_few_batches_of_a_seed_are_told():
    with pytest.raises(lj.RequestError, match="gave 2 batches"):
        sweep(
            loss_fn,
            base(),
            lambda seed: batches_of(seed, 2),
            CELLS[:2],
            num_steps=3,
            axes=AXES,
            progress=False,
        )


def test_tuning_chooses_within_each_contestant_and_keeps_the_basin():
    cells = [
        {"targets": "up", "rank": rank, "train": "head", "name": f"r{rank}"} for rank in (1, 4)
    ]
    rates = (1e-5, 1e-2, 1e30)
    arguments = {"num_steps": 20, "axes": AXES, "progress": False}
    found = sweep(
        loss_fn, base(), batches_of, cells, tune=("lr", rates), validation=VALIDATION, **arguments
    )
    assert [row.name for row in found][:3] == ["r1-lr1e-05", "r1-lr0.01", "r1-lr1e+30"]
    for tuned, rank in zip(found.tuned(), (1, 4), strict=True):
        assert tuned.name == f"r{rank}" and tuned.values == rates
        assert tuned.chosen == 1e-2 and not tuned.at_edge
        assert tuned.best is found[f"r{rank}-lr0.01"]
        assert tuned.losses[1] < tuned.losses[0] < tuned.losses[2] == float("inf")
    assert set(found.to_pandas()["group"]) == {"r1", "r4"}
    with pytest.raises(lj.RequestError, match="chooses on validation"):
        sweep(loss_fn, base(), batches_of, cells, tune=("lr", rates), **arguments)
    with pytest.raises(lj.RequestError, match="gives lr=0.1"):
        cells = [{**cells[0], "lr": 0.1}]
        sweep(loss_fn, base(), batches_of, cells, tune=("lr", rates), validation=VALIDATION, **arguments)  # fmt: skip  # noqa: E501


def test_own_metrics_are_means_over_the_validation_batches_of_the_merged_model():
    def metrics(params, batch):
        return {"spread": jnp.std(logits(params, batch["x"]))}

    cells = [{"targets": "up", "rank": rank, "lr": 1e-2, "train": "head"} for rank in (1, 3)]
    found = sweep(
        loss_fn, base(), batches_of(0), cells, num_steps=4, eval_every=2, axes=AXES,
        validation=VALIDATION, metrics=metrics, progress=False,
    )  # fmt: skip
    plain = sweep(
        loss_fn, base(), batches_of(0), cells, num_steps=4, eval_every=2, axes=AXES,
        validation=VALIDATION, progress=False,
    )  # fmt: skip
    for row, other in zip(found, plain, strict=True):
        assert row.validation == other.validation and [step for step, _ in row.metrics] == [2, 4]
        merged = row.method.merge(row.trainable, row.method.init(jax.random.key(0), base())[1])
        expected = np.mean([np.std(logits(merged, batch["x"])) for batch in VALIDATION])
        at_best = dict(row.metrics)[row.best_step]["spread"]
        np.testing.assert_allclose(at_best, expected, rtol=1e-5)
    table = found.to_pandas()
    assert list(table["best_spread"]) == [dict(r.metrics)[r.best_step]["spread"] for r in found]


def test_tree_with_functions_booleans_and_strings_sweeps_as_its_arrays_do():
    arrays = {"w": jnp.eye(4), "v": jnp.ones((4, 1))}
    tree = {**arrays, "activation": jnp.tanh, "use_bias": False, "kind": "mlp"}

    def loss(p, batch):
        activation = p.get("activation", jnp.tanh)
        assert not p.get("use_bias", False)
        return jnp.mean((activation(batch @ p["w"]) @ p["v"] - 1.0) ** 2)

    cells = [{"targets": "w", "rank": rank, "lr": 1e-2} for rank in (1, 2)]
    run = lambda base: lj.sweep(  # noqa: E731
        loss, base, [jnp.ones((8, 4))], cells, num_steps=2, progress=False
    )
    for row, plain in zip(run(tree), run(arrays), strict=True):
        assert not row.error
        np.testing.assert_array_equal(row.losses, plain.losses)


def test_wrong_setting_of_one_cell_is_its_error_and_the_others_train():
    base = {"w": jnp.eye(4)}
    cells = [
        {"targets": "w", "rank": 1, "lr": 1e-2},
        {"targets": "w", "lr": -1.0},
        {"targets": "w"},
        {"targets": "w", "lr": 1e-2, "seed": "a"},
        {"targets": "w", "lr": 1e-2, "rnk": 2},
        {"targets": "w", "lr": 1e-2, "method": "loraa"},
    ]
    loss = lambda p, batch: jnp.mean((batch @ p["w"] - 1.0) ** 2)  # noqa: E731
    found = lj.sweep(loss, base, [jnp.ones((2, 4))], cells, num_steps=1, progress=False)
    assert not found[0].error
    reasons = (
        "lr=-1.0 must",
        "lr=None must",
        "seed='a'",
        "'rnk'.*nearest: 'rank'",
        "'loraa'.*lora",
    )
    for row, why in zip(found[1:], reasons, strict=True):
        assert re.search(why, row.error) and row.trainable is None
    assert "array" not in repr(found.best()).lower()
    with pytest.raises(lj.RequestError, match="tune="):
        found.tuned()
    assert {"sweep", "load_model", "analysis", "peft"} <= set(dir(lj))


def test_part_of_no_axes_needs_no_padding():
    assert _pad(jnp.array(2.0), ()).item() == 2.0


def test_weights_that_overflow_in_the_last_update_are_an_error_and_the_others_train():
    """The loss of a step is from before its update, so the loss alone would not show it."""
    params = {"w": jnp.ones((4, 4))}
    cells = [{"targets": "w", "rank": 1, "lr": lr, "weight_decay": 1e3} for lr in (3e38, 1e-3)]
    found = sweep(
        lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, [jnp.ones((2, 4))], cells,
        num_steps=1, progress=False,
    )  # fmt: skip
    assert "a weight is nan at step 1" in found[0].error and "lower it" in found[0].error
    assert not found[1].error
