"""Many adapters trained as one program end where each ends alone."""

from __future__ import annotations

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.core.lift import lift
from lora_jax.sweeps.api import sweep
from lora_jax.sweeps.engine import PackTraining, Schedule
from lora_jax.sweeps.plan import make_plan
from lora_jax.sweeps.settings import read_cells
from lora_jax.train.build import keys_of

D, WIDE = 12, 20
STEPS = 50


def base():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"layers": (2, D, D), "up": (D, WIDE), "down": (WIDE, D), "head": (D, 3)}
    return {
        name: jax.random.normal(k, shape) / np.sqrt(shape[-2])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logits(params, x):
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["layers"])
    return (h + jax.nn.gelu(h @ params["up"]) @ params["down"]) @ params["head"]


def loss_fn(params, batch):
    scores = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


def batches_of(seed, count=STEPS, size=16):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = rng.normal(size=(size, D)).astype(np.float32)
        made.append({"x": x, "y": (np.abs(x[:, :3]).argmax(1)).astype(np.int32)})
    return made


AXES = lj.kernel_axes(logits, base(), jnp.ones((4, D)))
VALIDATION = batches_of(99, 2)
CELLS = [
    {"targets": "up", "rank": 1, "lr": 3e-3, "alpha": 1.0, "seed": 0},
    {"targets": "up", "rank": 4, "lr": 1e-2, "alpha": 8.0, "seed": 1, "weight_decay": 0.1},
    {"targets": ("up", "down"), "rank": 2, "lr": 1e-2, "alpha": 4.0, "seed": 2, "dropout": 0.2},
    {"targets": "layers", "rank": 8, "lr": 3e-3, "alpha": 16.0, "seed": 3, "weight_decay": 0.01},
    {"targets": ".*[^d]", "rank": 3, "lr": 1e-3, "alpha": 3.0, "seed": 4, "dropout": 0.5},
    {"targets": "down", "rank": 8, "lr": 2e-2, "alpha": 2.0, "seed": 5},
    {"targets": "layers", "rank": 1, "lr": 1e-2, "alpha": 2.0, "seed": 6, "init": "gaussian"},
    {"targets": "up", "rank": 8, "lr": 5e-3, "alpha": 8.0, "seed": 7, "weight_decay": 1.0},
]
CELLS = [{**cell, "train": "head"} for cell in CELLS]


def alone(cell, *, own_order):
    """The cell by itself, at its true rank, in the plainest loop: optax's AdamW, no pack."""
    method = lj.LoRA(
        **{k: v for k, v in cell.items() if k not in ("lr", "weight_decay", "seed")}, axes=AXES
    )
    _, init_key, run_key = keys_of(cell["seed"])
    trainable, frozen = method.init(init_key, base())
    tx = optax.adamw(cell["lr"], weight_decay=cell.get("weight_decay", 0.0))
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state, batch, key):
        def loss(trainable):
            return lift(loss_fn)(method.bind(trainable, frozen, key=key), batch)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for n, batch in enumerate(batches_of(cell["seed"] if own_order else 0)):
        key = jax.random.fold_in(run_key, n)
        trainable, state, value = step(trainable, state, batch, key)
        losses.append(float(value))
    return trainable, np.array(losses)


def training_of(cells, *, patience=0, eval_every=0, validation=()):
    """The one pack of these cells, as `sweep` trains it."""
    from lora_jax.sweeps import api

    made = []
    original = api.PackTraining
    try:
        api.PackTraining = lambda *args, **kw: made.append(original(*args, **kw)) or made[-1]
        results = sweep(
            loss_fn,
            base(),
            batches_of,
            cells,
            num_steps=STEPS,
            axes=AXES,
            patience=patience,
            eval_every=eval_every,
            validation=validation,
            progress=False,
        )
    finally:
        api.PackTraining = original
    assert len(made) == 1
    return made[0], results


@pytest.fixture(scope="module")
def packed():
    return training_of(CELLS)


def test_packed_cells_end_where_they_end_alone(packed, record_property):
    _, results = packed
    worst_loss = worst_weight = 0.0
    for cell, found in zip(CELLS, results, strict=True):
        trainable, losses = alone(cell, own_order=True)
        worst_loss = max(worst_loss, float(np.max(np.abs(losses - found.losses))))
        assert jax.tree.structure(trainable) == jax.tree.structure(found.trainable)
        for x, y in zip(jax.tree.leaves(trainable), jax.tree.leaves(found.trainable), strict=True):
            assert x.shape == y.shape
            worst_weight = max(worst_weight, float(jnp.max(jnp.abs(x - y))))
    record_property("largest_loss_difference", worst_loss)
    record_property("largest_weight_difference", worst_weight)
    assert worst_loss <= 1e-5
    assert worst_weight <= 1e-4
    # They learned something, each something else.
    assert all(found.losses[-5:].mean() < found.losses[:5].mean() for found in results)


def test_padding_is_exactly_zero_at_the_end(packed):
    training, _ = packed
    for place, k in enumerate(training.slots):
        own = jax.tree.map(lambda leaf, p=place: leaf[p], training.state.trainable)
        padding = training.pack.padding(own, k)
        assert sum(part.size for part in padding) > 0
        assert not any(np.asarray(part).any() for part in padding)
        for moments in (training.state.opt_state[1].mu, training.state.opt_state[1].nu):
            moments = jax.tree.map(lambda leaf, p=place: leaf[p], moments)
            assert not any(np.asarray(p).any() for p in training.pack.padding(moments, k))


def test_a_padded_cell_starts_as_its_unpadded_twin():
    planned, _ = make_plan(read_cells(CELLS, axes=AXES), base())
    pack, cells = planned[0].pack, planned[0].cells
    keys = [keys_of(cell.seed)[1] for cell in cells]
    trainable, _ = pack.init(keys, base())
    for k, cell in enumerate(cells):
        own = pack.unpack(jax.tree.map(lambda leaf, k=k: leaf[k], trainable), k)
        twin, _ = cell.method.init(keys[k], base())
        assert own.keys() == twin.keys()
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), own, twin))


def test_a_cell_that_turns_nan_changes_no_neighbours_bits(packed):
    _, good = packed
    cells = [dict(cell) for cell in CELLS]
    cells[2] = {**cells[2], "lr": 1e30}
    _, results = training_of(cells)
    assert "loss is" in results[2].error and "lower lr" in results[2].error
    for k in set(range(8)) - {2}:
        assert not results[k].error
        assert np.array_equal(results[k].losses, good[k].losses)
        same = jax.tree.map(np.array_equal, results[k].trainable, good[k].trainable)
        assert jax.tree.all(same)


def test_early_stops_and_repacking_change_nothing_beyond_rounding():
    # The first five overshoot at once and stop; the rest go on, repacked.
    cells = [{**c, "lr": 0.3 if k < 5 else c["lr"] / 5} for k, c in enumerate(CELLS)]
    looked = {"eval_every": 5, "validation": VALIDATION}
    training, results = training_of(cells, patience=2, **looked)
    _, never = training_of(cells, **looked)
    assert len(training.slots) < 8, "no repacking was seen"
    ends = [len(found.losses) for found in results]
    assert min(ends) < STEPS
    for found, whole in zip(results, never, strict=True):
        n = len(found.losses)
        assert np.max(np.abs(found.losses - whole.losses[:n])) <= 1e-4
        assert found.stopped.startswith("validation stopped" if n < STEPS else ("budget", "valid"))
        steps = dict(found.validation)
        assert found.best_step == min(steps, key=lambda step: (steps[step], step))
        # What is kept scores what is said.
        merged = found.method.merge(found.trainable, base())
        score = np.mean([float(loss_fn(merged, batch)) for batch in VALIDATION])
        assert score == pytest.approx(found.best_loss, abs=1e-5)


def _tensors(text):
    """Shapes of all arrays named in an HLO text."""
    return {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[(\d+(?:,\d+)*)\]", text)}


def test_the_base_has_no_axis_of_cells_and_arguments_grow_by_the_adapters_only():
    bytes_of, grown = {}, {}
    for count in (1, 8, 64):
        cells = [{**CELLS[k % 8], "seed": k, "lr": 1e-3} for k in range(count)]
        cells[0]["targets"], cells[0]["rank"] = ".*[^d]", 8
        (plan,), refused = make_plan(read_cells(cells, axes=AXES), base())
        assert not refused
        tx = optax.adamw(1e-3)
        training = PackTraining(
            plan.pack,
            plan.cells,
            base(),
            lift(loss_fn),
            lambda cell, tx=tx: tx,
            batch_axis=None,
            validation=(),
            schedule=Schedule(1, 0, 0),
        )
        batch = batches_of(0, 1)[0]
        compiled = training.compiled(batch)
        bytes_of[count] = compiled.memory_analysis().argument_size_in_bytes
        grown[count] = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state.trainable))
        if count == 8:
            kernels = {base()[name].shape for name in ("layers", "up", "down")}
            kernels |= {(D, D), (D, WIDE)[::-1], (WIDE, D)[::-1]}
            with_cells = {(8, *shape) for shape in kernels}
            assert not with_cells & _tensors(compiled.as_text())
    for count in (8, 64):
        # Adapters and their two moments, and some scalars a cell: keys, counts, rates, scales.
        added, cells_only = bytes_of[count] - bytes_of[1], 3 * (grown[count] - grown[1])
        assert 0 <= added - cells_only <= 100 * (count - 1)


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
    assert results["lora-inner/kernel-rank1-lr0.03"].num_trainable == 4 + 16 + 16 + 1


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


def test_a_memory_budget_narrows_the_packs():
    cells = [{**CELLS[0], "seed": seed} for seed in range(4)]
    arguments = {"num_steps": 3, "axes": AXES, "progress": False}
    wide = sweep(loss_fn, base(), batches_of(0), cells, **arguments)
    narrow = sweep(loss_fn, base(), batches_of(0), cells, memory_bytes=1, **arguments)
    assert [row.width for row in wide] == [4] * 4 and [row.width for row in narrow] == [1] * 4
    for x, y in zip(wide, narrow, strict=True):
        assert np.max(np.abs(x.losses - y.losses)) < 1e-5


def test_an_impossible_cell_says_why_and_the_others_run():
    cells = [*CELLS[:2], {"targets": "up", "rank": 13, "lr": 1e-3}, {"targets": "upp", "lr": 1e-3}]
    found = sweep(loss_fn, base(), batches_of(0), cells, num_steps=3, axes=AXES, progress=False)
    assert [bool(row.error) for row in found] == [False, False, True, True]
    assert "rank 13 is above the full rank 12 of 'up'" in found[2].error
    assert "matches no parameter" in found[3].error
    assert found[2].trainable is None and found.to_pandas()["stopped"].notna().all()


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([], "cells is empty"),
        ([CELLS[0], CELLS[0]], "same settings"),
        ([{**CELLS[0], "name": "a"}, {**CELLS[1], "name": "a"}], "named 'a'"),
        ([{**CELLS[0], "rnk": 2}], "'rnk'.*nearest: 'rank'"),
        ([{"targets": "up"}], "lr is None"),
        ([{"targets": "up", "lr": -1.0}], "lr is -1.0"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(cells, words):
    with pytest.raises(lj.RequestError, match=words):
        sweep(loss_fn, base(), batches_of(0), cells, num_steps=3, axes=AXES, progress=False)


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
