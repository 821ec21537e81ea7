"""Many adapters trained as one program end where each ends alone."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core.lift import lift
from lora_jax.sweeps import in_memory
from lora_jax.sweeps.groups import make_packs
from lora_jax.sweeps.program import PackedProgram
from lora_jax.sweeps.settings import read_cells
from lora_jax.train.build import keys_of
from tests.sweeps.problem import (
    AXES,
    CELLS,
    DRY,
    STEPS,
    VALIDATION,
    WIDE,
    D,
    alone,
    base,
    batches_of,
    loss_fn,
    training_of,
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(0, marks=pytest.mark.slow), 1],
    ids=["side-by-side", "one-by-one"],
)
def packed(request):
    """The training, its results, and the seconds that it took."""
    start = time.perf_counter()
    training, results = training_of(CELLS, at_once=request.param)
    return training, results, time.perf_counter() - start


def differences(found, expected):
    """Largest differences of losses and of weights from (trainable, losses) of the cell alone."""
    trainable, losses = expected
    assert jax.tree.structure(trainable) == jax.tree.structure(found.trainable)
    pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(found.trainable), strict=True)
    weights = [float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs]
    return float(np.max(np.abs(losses - found.losses))), max(weights)


# Each cell alone is a program to compile: these have two targets, a scanned one, dropout, decay
# and the other start; the rest differ from them in numbers.
FEW, REST = (1, 2, 3, 6), (0, 4, 5, 7)


@pytest.mark.parametrize("places", [FEW, pytest.param(REST, marks=pytest.mark.slow)])
def test_packed_cells_end_where_they_end_alone(packed, places, record_property):
    """Seen: losses within 5e-7, weights within 2e-7."""
    _, results, _ = packed
    of_cells = [
        differences(results[k], alone(CELLS[k], batches_of(CELLS[k]["seed"]))) for k in places
    ]
    worst_loss, worst_weight = map(max, zip(*of_cells, strict=True))
    record_property("largest_loss_difference", worst_loss)
    record_property("largest_weight_difference", worst_weight)
    assert worst_loss <= 1e-5
    assert worst_weight <= 1e-4
    # They learned something, each something else.
    assert all(found.losses[-5:].mean() < found.losses[:5].mean() for found in results)


@pytest.mark.slow
def test_chunks_of_cells_that_do_not_divide_them_evenly_change_nothing():
    _, whole = training_of(DRY[:4], at_once=0, num_steps=5)
    _, threes = training_of(DRY[:4], at_once=3, num_steps=5)
    for one, other in zip(whole, threes, strict=True):
        assert np.max(np.abs(one.losses - other.losses)) <= 1e-6


def test_shared_batches_schedule_clipping_and_betas_are_those_of_optax_alone():
    cells = DRY[1:3]
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
            site = pack.sites[k].get(path)
            rank = site.rank if site else 0
            axis = site.roles.count("s") if site else entry["b"].ndim - 2
            rest.append(entry["a"][..., rank:])
            rest.append(np.moveaxis(entry["b"], axis, 0)[rank:])
    return [part for part in rest if part.size]


def test_padding_is_exactly_zero_at_the_end(packed):
    training, *_ = packed
    state = jax.device_get(training.state)
    for place, k in enumerate(training.lanes):
        own = jax.tree.map(lambda leaf, p=place: leaf[p], state.trainable)
        parts = padding(training.pack, own, k)
        assert sum(part.size for part in parts) > 0
        assert not any(part.any() for part in parts)
        for moments in (state.opt_state[1].mu, state.opt_state[1].nu):
            moments = jax.tree.map(lambda leaf, p=place: leaf[p], moments)
            assert not any(p.any() for p in padding(training.pack, moments, k))


def test_a_padded_cell_starts_as_its_unpadded_twin():
    (pack, *_), _ = make_packs(read_cells(CELLS, axes=AXES), base())
    cells = pack.cells
    keys = [keys_of(cell.seed)[1] for cell in cells]
    trainable = pack.init(keys, [base()] * len(keys))
    for k, cell in enumerate(cells):
        own = pack.unpack(trainable[k], k)
        twin, _ = cell.method.init(keys[k], base())
        assert own.keys() == twin.keys()
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), own, twin))


def test_a_cell_that_turns_nan_changes_no_neighbours_bits(packed):
    trained, good, _ = packed
    cells = [dict(cell) for cell in CELLS]
    cells[2] = {**cells[2], "lr": 1e30}
    _, results = training_of(cells, at_once=trained._program.at_once)
    assert "loss is" in results[2].error and "lower it" in results[2].error
    for k in set(range(8)) - {2}:
        assert not results[k].error
        assert np.array_equal(results[k].losses, good[k].losses)
        same = jax.tree.map(np.array_equal, results[k].trainable, good[k].trainable)
        assert jax.tree.all(same)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 1])
def test_early_stops_and_repacking_change_nothing_beyond_rounding(at_once):
    # The first five do not learn, so they stop after three looks; the rest go on, repacked.
    cells = [{**c, "lr": 0.0 if k < 5 else c["lr"] / 5} for k, c in enumerate(DRY)]
    looked = {"eval_every": 5, "validation": VALIDATION, "at_once": at_once}
    training, results = training_of(cells, patience=2, **looked)
    _, never = training_of(cells, **looked)
    assert len(training.lanes) < 8, "no repacking was seen"
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


@pytest.mark.slow
def test_half_of_the_cells_diverging_is_survived_and_their_best_is_kept():
    cells = [{**c, "lr": 1e12 if k % 2 else c["lr"]} for k, c in enumerate(DRY)]
    schedule = {"schedule": "linear", "warmup_ratio": 0.5, "eval_every": 1}
    training, results = training_of(cells, validation=VALIDATION, **schedule)
    _, good = training_of(
        [c for k, c in enumerate(cells) if k % 2 == 0], validation=VALIDATION, **schedule
    )
    assert len(training.lanes) == 4
    for k, found in enumerate(results):
        if k % 2:
            # The rate of the first step of a warm-up is 0, so the weights after it were good.
            assert "lower it" in found.error and found.trainable is not None
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


def test_each_cell_has_its_share_of_the_seconds_and_no_more_are_shared_than_passed(packed):
    _, results, took = packed
    counted = sum(row.seconds + row.compile_seconds for row in results)
    assert all(row.seconds > 0 and row.compile_seconds > 0 for row in results)
    assert counted <= took  # the rest is planning and the start of the adapters


def _tensors(text):
    """Shapes of all arrays named in an HLO text."""
    return {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[(\d+(?:,\d+)*)\]", text)}


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 1])
def test_the_base_has_no_axis_of_cells_and_arguments_grow_by_the_adapters_only(at_once):
    bytes_of, grown, products = {}, {}, {}
    for count in (1, 8, 64):
        cells = [{**DRY[k % 8], "seed": k, "lr": 1e-3} for k in range(count)]
        cells[0]["targets"], cells[0]["rank"] = ".*[^d]", 8
        (pack,), refused = make_packs(read_cells(cells, axes=AXES), base())
        assert not refused
        tx = optax.adamw(1e-3)
        both = in_memory._loss_and_scores(pack, lift(loss_fn), None)
        program = PackedProgram(*both, lambda cell, tx=tx: tx, tx, batch_axis=None, at_once=at_once)
        state = program.init(pack, [base()] * count)
        _, frozen = pack.cells[0].method.init(jax.random.key(0), base())
        both = (pack.data(), frozen)
        compiled = program._step.compiled(state, both, batches_of(0, 1)[0])
        bytes_of[count] = compiled.memory_analysis().argument_size_in_bytes
        lowered = program._step._function.lower(state, both, batches_of(0, 1)[0])
        products[count] = lowered.as_text().count("stablehlo.dot_general")
        grown[count] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
        if count == 8:
            kernels = {base()[name].shape for name in ("layers", "up", "down")}
            kernels |= {(D, D), (D, WIDE)[::-1], (WIDE, D)[::-1]}
            with_cells = {(8, *shape) for shape in kernels}
            assert not with_cells & _tensors(compiled.as_text())
    # As many products in the program as for one cell: side by side, each weight of the base is read
    # no more often; one by one, the loop over cells reads it in each turn.
    assert products[1] == products[8] == products[64] > 0
    for count in (8, 64):
        # Adapters and their two moments, and some scalars a cell: keys, counts, rates, scales.
        added, cells_only = bytes_of[count] - bytes_of[1], 3 * (grown[count] - grown[1])
        assert 0 <= added - cells_only <= 100 * (count - 1)


def test_another_optimizer_trains_each_cell_at_its_own_rate_and_with_the_schedule():
    """Lion with momentum at two rates and ranks in one pack, and alone in a plain loop."""
    cells = [{**CELLS[1], "lr": 1e-3}, {**CELLS[2], "lr": 3e-3}]
    cells = [{k: v for k, v in cell.items() if k != "weight_decay"} for cell in cells]
    _, results = training_of(cells, tx=optax.lion, num_steps=6, schedule="linear")
    assert [row.width for row in results] == [2, 2]
    for cell, row in zip(cells, results, strict=True):
        lion = optax.lion(optax.linear_schedule(cell["lr"], 0.0, 6), weight_decay=1e-3)
        expected = alone(cell, batches_of(cell["seed"])[:6], lion)
        assert max(differences(row, expected)) < 1e-5
        assert np.ptp(row.losses) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tx": optax.lion(1e-3)}, "tx=optax.lion"),
        ({"tx": optax.lion, "beta1": 0.5}, "beta1, beta2 and eps are AdamW's"),
        ({"tx": optax.lion, "cells": [{**CELLS[0], "weight_decay": 0.1}]}, "weight_decay=0.1"),
    ],
)
def test_settings_that_another_optimizer_does_not_take_are_refused(options, words):
    cells = options.pop("cells", [{k: v for k, v in CELLS[0].items() if k != "weight_decay"}])
    with pytest.raises(lj.RequestError, match=words):
        training_of(cells, **options)
