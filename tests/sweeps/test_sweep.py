"""Many adapters trained as one program end where each ends alone."""

from __future__ import annotations

import re
import time

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.core.lift import lift
from lora_jax.sweeps import api
from lora_jax.sweeps.api import sweep
from lora_jax.sweeps.plan import make_plan
from lora_jax.sweeps.program import Program
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


def alone(cell, batches, tx=None):
    """The cell by itself, at its true rank, in the plainest loop: optax's AdamW, no pack."""
    method = lj.LoRA(
        **{k: v for k, v in cell.items() if k not in ("lr", "weight_decay", "seed")}, axes=AXES
    )
    _, init_key, run_key = keys_of(cell["seed"])
    trainable, frozen = method.init(init_key, base())
    tx = tx or optax.adamw(cell["lr"], weight_decay=cell.get("weight_decay", 0.0))
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state, batch, key):
        def loss(trainable):
            return lift(loss_fn)(method.bind(trainable, frozen, key=key), batch)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for n, batch in enumerate(batches):
        key = jax.random.fold_in(run_key, n)
        trainable, state, value = step(trainable, state, batch, key)
        losses.append(float(value))
    return trainable, np.array(losses)


def training_of(cells, *, batches=batches_of, **options):
    """The one pack of these cells, as `sweep` trains it, and its results."""
    made = []
    original = api.PackTraining
    options = {"num_steps": STEPS, "axes": AXES, "progress": False, **options}
    try:
        api.PackTraining = lambda *args: made.append(original(*args)) or made[-1]
        results = sweep(loss_fn, base(), batches, cells, **options)
    finally:
        api.PackTraining = original
    assert len(made) == 1
    return made[0], results


@pytest.fixture(scope="module")
def packed():
    return training_of(CELLS)


def differences(found, expected):
    """Largest differences of losses and of weights from (trainable, losses) of the cell alone."""
    trainable, losses = expected
    assert jax.tree.structure(trainable) == jax.tree.structure(found.trainable)
    pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(found.trainable), strict=True)
    weights = [float(jnp.max(jnp.abs(x - y))) for x, y in pairs]
    return float(np.max(np.abs(losses - found.losses))), max(weights)


def test_packed_cells_end_where_they_end_alone(packed, record_property):
    """Seen: losses within 5e-7, weights within 2e-7."""
    _, results = packed
    of_cells = [
        differences(found, alone(cell, batches_of(cell["seed"])))
        for cell, found in zip(CELLS, results, strict=True)
    ]
    worst_loss, worst_weight = map(max, zip(*of_cells, strict=True))
    record_property("largest_loss_difference", worst_loss)
    record_property("largest_weight_difference", worst_weight)
    assert worst_loss <= 1e-5
    assert worst_weight <= 1e-4
    # They learned something, each something else.
    assert all(found.losses[-5:].mean() < found.losses[:5].mean() for found in results)


def test_shared_batches_schedule_clipping_and_betas_are_those_of_optax_alone():
    cells = CELLS[:3]
    _, results = training_of(
        cells,
        batches=batches_of(0),
        clip_norm=0.3,
        schedule="linear",
        warmup_ratio=0.2,
        beta1=0.8,
        beta2=0.95,
        eps=1e-6,
    )
    for cell, found in zip(cells, results, strict=True):
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, cell["lr"], STEPS // 5),
                optax.linear_schedule(cell["lr"], 0.0, STEPS - STEPS // 5),
            ],
            [STEPS // 5],
        )
        decay = cell.get("weight_decay", 0.0)
        tx = optax.chain(
            optax.clip_by_global_norm(0.3), optax.adamw(rate, 0.8, 0.95, 1e-6, weight_decay=decay)
        )
        of_loss, of_weight = differences(found, alone(cell, batches_of(0), tx))
        assert of_loss <= 1e-5 and of_weight <= 1e-4


def padding(pack, trainable, k):
    """What of member k's padded tree is not its own."""
    rest = []
    for path, entry in trainable.items():
        if "value" not in entry:
            factors = pack.factors[k].get(path)
            rank = factors.rank if factors else 0
            axis = factors.rank_axis_of_b if factors else entry["b"].ndim - 2
            rest.append(entry["a"][..., rank:])
            rest.append(jnp.moveaxis(entry["b"], axis, 0)[rank:])
    return [part for part in rest if part.size]


def test_padding_is_exactly_zero_at_the_end(packed):
    training, _ = packed
    for place, k in enumerate(training.slots):
        own = jax.tree.map(lambda leaf, p=place: leaf[p], training.state.trainable)
        parts = padding(training.plan.pack, own, k)
        assert sum(part.size for part in parts) > 0
        assert not any(np.asarray(part).any() for part in parts)
        for moments in (training.state.opt_state[1].mu, training.state.opt_state[1].nu):
            moments = jax.tree.map(lambda leaf, p=place: leaf[p], moments)
            assert not any(np.asarray(p).any() for p in padding(training.plan.pack, moments, k))


def test_a_padded_cell_starts_as_its_unpadded_twin():
    planned, _ = make_plan(read_cells(CELLS, axes=AXES), base())
    pack, cells = planned[0].pack, planned[0].cells
    keys = [keys_of(cell.seed)[1] for cell in cells]
    trainable = pack.init(keys, base())
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
    # The first five do not learn, so they stop after three looks; the rest go on, repacked.
    cells = [{**c, "lr": 0.0 if k < 5 else c["lr"] / 5} for k, c in enumerate(CELLS)]
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


def test_half_of_the_cells_diverging_is_survived_and_their_best_is_kept():
    cells = [{**c, "lr": 1e12 if k % 2 else c["lr"]} for k, c in enumerate(CELLS)]
    schedule = {"schedule": "linear", "warmup_ratio": 0.5, "eval_every": 1}
    training, results = training_of(cells, validation=VALIDATION, **schedule)
    _, good = training_of(
        [c for k, c in enumerate(cells) if k % 2 == 0], validation=VALIDATION, **schedule
    )
    assert len(training.slots) == 4
    for k, found in enumerate(results):
        if k % 2:
            # The rate of the first step of a warm-up is 0, so the weights after it were good.
            assert "lower lr" in found.error and found.trainable is not None
            assert found.best_step == 1 and np.isfinite(found.losses[0])
        else:
            assert not found.error
            assert np.max(np.abs(found.losses - good[k // 2].losses)) <= 1e-4
    assert results.best().error == ""


def test_an_update_that_is_not_a_number_is_not_kept():
    def loss(params, batch):
        # Finite itself, with a gradient that is not: sqrt at 0.
        return jnp.sum(jnp.sqrt(jnp.abs(batch @ params["w"]) * 0.0))

    cells = [{"targets": "w", "rank": 1, "lr": 1e-3}]
    found = lj.sweep(
        loss, {"w": jnp.eye(4)}, [jnp.ones((2, 4))], cells, num_steps=1, progress=False
    )
    assert "gradient norm is nan at step 1" in found[0].error and "data" in found[0].error
    assert found[0].trainable is None


def test_each_cell_has_its_share_of_the_seconds_and_no_more_are_shared_than_passed():
    start = time.perf_counter()
    _, results = training_of(CELLS[:4])
    took = time.perf_counter() - start
    counted = sum(row.seconds + row.compile_seconds for row in results)
    assert all(row.seconds > 0 and row.compile_seconds > 0 for row in results)
    assert counted <= took  # the rest is planning and the start of the adapters


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
        program = Program(plan.pack, lift(loss_fn), lambda cell, tx=tx: tx, tx, batch_axis=None)
        state = program.init(plan.pack, plan.cells, base())
        _, frozen = plan.cells[0].method.init(jax.random.key(0), base())
        both = (plan.pack.data(), frozen)
        compiled = program._get("step", state, both, batches_of(0, 1)[0])
        bytes_of[count] = compiled.memory_analysis().argument_size_in_bytes
        grown[count] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
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
    assert results["lora-inner/kernel-rank1-lr0.03-trainout/.*"].num_trainable == 4 + 16 + 16 + 1


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
    def loss(params, batch):
        if "adapted" in str(type(params["up"])):
            raise AssertionError
        return loss_fn(params, batch)

    def batches(seed):
        return batches_of(seed, 3 if seed == 0 else 1)

    cells = [
        {"targets": "up", "rank": 2, "lr": 1e-2, "train": "head"},
        {"targets": "up", "rank": 9, "lr": 1e-2, "train": "head", "seed": 1},
    ]
    found = sweep(loss, base(), batches, cells, num_steps=3, axes=AXES, progress=False)
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
        ([{**CELLS[0], "rnk": 2}], "'rnk'.*nearest: 'rank'"),
        ([{"targets": "up"}], "lr is None"),
        ([{"targets": "up", "lr": -1.0}], "lr is -1.0"),
        ([{"targets": "up", "lr": 1e-3, "seed": "a"}], "seed is 'a'"),
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
    assert "'rank' stands beside a ready method" in found[2].error
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
