"""Verdicts on hypotheses: from runs on disk, and by intervals made to fall where they do."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.analysis import findings, hypotheses, index
from lora_jax.core.errors import RequestError
from lora_jax.report.runs import FinishedRun, Predictions
from lora_jax.report.statistics import Interval
from lora_jax.train.record import Card
from tests.cards import card_json

ROOT = Path(__file__).parents[2]
# Those with a sweep of their own.
SWEEPS = (
    *("what_rank", "which_matrices", "intrinsic_dimension", "tuned_per_rank", "batch_size"),
    *("low_data", "rank_caps_movement", "what_rank_e2e", "qlora"),
)


def run_of(name, seed, losses, lr=1e-3, validation=1.0):
    losses = np.asarray(losses, np.float64)
    index = np.arange(len(losses))
    ones = np.ones(len(losses))
    scores = {"metrics.validation.loss": validation, "metrics.test.loss": float(losses.mean())}
    card = Card.from_json(card_json(scores))
    config = {"seed": seed, "optimizer": {"lr": lr}, "method": {"name": "lora"}}
    predictions = Predictions(losses, index > 3, index, index, ones)
    return FinishedRun(f"{name}-lr{lr}-s{seed}", Path(name), config, (), card, predictions)


def arm(name, rows):
    runs = tuple(run_of(name, seed, row) for seed, row in enumerate(rows))
    return hypotheses.Arm(name, {1e-3: 1.0}, 1e-3, runs, runs)


def test_texts_count_by_their_tokens():
    one = run_of("one", 0, [1.0, 2.0, 4.0])
    predictions = dataclasses.replace(one.predictions, weight=np.array([5.0, 3.0, 2.0]))
    run = dataclasses.replace(one, predictions=predictions)
    losses = hypotheses.Arm("one", {1e-3: 1.0}, 1e-3, (run,), (run,)).losses
    assert losses.mean() == pytest.approx((5 * 1 + 3 * 2 + 2 * 4) / 10)


def test_prompts_are_the_units_where_their_pairs_are_alike():
    """Ten pairs of each prompt with one loss: the interval is that of the prompts alone."""
    prompts = np.random.default_rng(0).normal(1.0, 0.5, 20)
    one = arm("one", [np.repeat(prompts, 10)])
    by_pair = one.test_loss
    found = dataclasses.replace(one, units=np.repeat(np.arange(20), 10)).test_loss
    alone = arm("alone", [prompts]).test_loss
    assert found.estimate == pytest.approx(by_pair.estimate) == pytest.approx(prompts.mean())
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    assert found.high - found.low > 2.5 * (by_pair.high - by_pair.low)


@pytest.mark.parametrize(
    "shift, is_worse, is_equal",
    [
        (0.10, hypotheses.HOLDS, hypotheses.REFUTED),
        (0.00, hypotheses.REFUTED, hypotheses.HOLDS),
        (0.05, hypotheses.INCONCLUSIVE, hypotheses.INCONCLUSIVE),  # just at the margin, and noisy
        (-0.1, hypotheses.REVERSE, hypotheses.REFUTED),
    ],
)
def test_a_verdict_follows_the_interval(shift, is_worse, is_equal):
    rng = np.random.default_rng(0)
    base = rng.normal(1.0, 0.5, (3, 400))
    moved = base + shift + (0.3 if shift == 0.05 else 0.02) * rng.normal(size=base.shape)
    one, other = arm("one", moved), arm("other", base)
    assert hypotheses.worse("n", "c", one, other, 0.05).verdict == is_worse
    assert hypotheses.equivalent("n", "c", one, other, 0.05).verdict == is_equal
    found = hypotheses.difference(one, other)
    assert isinstance(found, Interval)
    np.testing.assert_allclose(found.estimate, (moved - base).mean(), atol=1e-12)


def write_cell(folder, name, *, lr, seed, validation, test, failed=False):
    cell = folder / "cells" / name
    cell.mkdir(parents=True)
    config = {
        "seed": seed,
        "method": {"name": "lora", "targets": "q", "rank": 2},
        "optimizer": {"lr": lr},
        "data": {"seed": 0},
        "model": {"name": "tiny-bert"},
    }
    (cell / "config.json").write_text(json.dumps(config))
    if failed:
        (cell / "failure.json").write_text("{}")
        return
    card = card_json(
        {"metrics.validation.loss": validation, "metrics.test.loss": test, "metrics.steps": 3},
        config=config,
        **dict.fromkeys(("config_hash", "base_hash", "data_hash"), "ab" * 32),
    )
    (cell / "card.json").write_text(json.dumps(card))
    index = np.arange(5)
    with open(cell / "test_predictions.npz", "wb") as file:
        np.savez(file, loss=np.full(5, test), correct=index > 2, label=index, index=index)


def workdir_of(tmp_path):
    cells = {
        "a-lr0.001-s0": {"lr": 1e-3, "seed": 0, "validation": 0.9, "test": 0.5},
        "a-lr0.01-s0": {"lr": 1e-2, "seed": 0, "validation": 0.7, "test": 0.8},
        "a-lr0.1-s0": {"lr": 1e-1, "seed": 0, "validation": None, "test": 9.0, "failed": True},
        "a-lr0.01-s1": {"lr": 1e-2, "seed": 1, "validation": 0.9, "test": 0.6},
    }
    for name, settings in cells.items():
        write_cell(tmp_path, name, **settings)
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": list(cells)}))
    return tmp_path


def test_the_rate_is_chosen_on_the_first_seeds_validation_loss(tmp_path):
    (one,) = hypotheses.read_arms(workdir_of(tmp_path)).values()
    assert one.lr == 1e-2  # though the other rate's test loss is lower
    assert one.rates == {1e-3: 0.9, 1e-2: 0.7, 1e-1: float("inf")}
    assert one.seeds == (0, 1) and not one.at_edge
    np.testing.assert_allclose(one.test_loss.estimate, 0.7)
    assert [run.name for run in one.all_runs] == ["a-lr0.001-s0", "a-lr0.01-s0", "a-lr0.01-s1"]


def test_what_has_not_ended_or_is_not_tuned_is_named(tmp_path):
    workdir = workdir_of(tmp_path)
    (workdir / "cells" / "a-lr0.1-s0" / "failure.json").unlink()
    with pytest.raises(RequestError, match="has not ended"):
        hypotheses.read_arms(workdir)
    write_cell(workdir, "plain", lr=1.0, seed=0, validation=1.0, test=1.0)
    sweep = json.loads((workdir / "sweep.json").read_text())
    (workdir / "sweep.json").write_text(json.dumps({"cells": ["plain", *sweep["cells"]]}))
    with pytest.raises(RequestError, match="of no tuned arm"):
        hypotheses.read_arms(workdir)


def test_what_is_written_holds_the_hashes_and_no_figure_typed_by_hand(tmp_path):
    found = hypotheses.read_arms(workdir_of(tmp_path / "work"))
    runs = [run for one in found.values() for run in one.all_runs]
    findings.write_findings(
        tmp_path / "out",
        title="A question",
        name="qlora",
        command="python -m it",
        verdicts=[hypotheses.decide("name", "claim", "seen", None)],
        parts=[findings.arm_table(found)],
        runs=runs,
    )
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line)["config_hash"] for line in lines] == ["ab" * 32] * 3
    text = (tmp_path / "out" / "README.md").read_text()
    assert findings.paragraph_of("qlora", "Limits") in text
    verdict = "no interval (point estimate: inconclusive)"
    assert f"| name: claim | seen | **{verdict}** |" in text and "| a | 7 | 1e-2 |" in text
    kept = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert kept["commits"] == ["c" * 40] and kept["verdicts"][0]["verdict"] == verdict


def test_a_arms_seeds_are_read_from_a_sweep_and_from_what_was_kept_of_it(tmp_path):
    workdir, kept = workdir_of(tmp_path / "work"), tmp_path / "kept"
    found = hypotheses.read_arms(workdir)
    runs = found["a"].all_runs
    findings.write_findings(
        kept, title="t", name="qlora", command="c", verdicts=[], parts=[], runs=runs
    )
    rows = findings.seeds_of(workdir, "a")
    assert [(row["lr"], row["seed"]) for row in rows] == [(1e-2, 0), (1e-2, 1)]
    assert findings.seeds_of(kept, "a") == rows
    for place in (workdir, kept):
        with pytest.raises(RequestError, match="has no 'aa'; nearest: 'a'"):
            findings.seeds_of(place, "aa")


def test_gaps_are_paired_differences_at_the_same_number(tmp_path):
    rng = np.random.default_rng(0)
    base = {number: rng.normal(1.0, 0.5, (3, 200)) for number in (8, 32)}
    shift = {8: 0.25, 32: -0.5}
    found = {f"full-b{n}": arm(f"full-b{n}", rows) for n, rows in base.items()}
    found |= {f"q-r1-b{n}": arm(f"q-r1-b{n}", base[n] + shift[n]) for n in (32, 8)}
    gaps = findings.gaps_by_number(found, "-b", beside="full")
    assert {n: round(gap.estimate, 9) for n, gap in gaps["q-r1"].items()} == shift
    table = findings.gap_table(gaps, label="size", beside="full")
    assert table.splitlines()[2:] == [
        "| 8 | +0.250 [+0.250, +0.250] |",
        "| 32 | -0.500 [-0.500, -0.500] |",
    ]
    figure = findings.draw_by_number(found, gaps, "-b", label="size", beside="full")
    assert findings.figure_file(figure, tmp_path, "it") == "![it](it.png)"


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_a_smoke_size_and_five_rates(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    added = {}
    module.sweep_full_size(lambda cell, **settings: added.update({cell: settings}))
    assert added and all(len(settings["tune"][1]) >= 5 for settings in added.values())
    assert module.get_config("smoke").model.name.startswith("tiny-")
    with pytest.raises(ValueError, match="no size 'large'"):
        module.get_config("large")


@pytest.mark.parametrize("name", [name for name in index.ORDER if index.is_run(name)])
def test_the_limits_of_an_experiment_stand_on_its_page(name):
    page = (ROOT / "experiments" / "results" / name / "README.md").read_text()
    assert findings.paragraph_of(name, "Limits") in page


def test_the_page_of_experiments_is_that_of_their_docstrings_and_verdicts():
    assert (ROOT / "experiments" / "README.md").read_text() == index.to_page()


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS[:2])
def test_a_smoke_sweep_is_run_and_written(name, tmp_path):
    command = [sys.executable, "-m", "lora_jax", "sweep", f"--config={name}"]
    command += ["--sweep=smoke", f"--workdir={tmp_path / 'runs'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", "experiments.analysis", name, str(tmp_path / "runs")]
    subprocess.run([*command, f"--out={tmp_path / 'out'}"], cwd=ROOT, check=True)
    assert "| arm |" in (tmp_path / "out" / "README.md").read_text()
    assert list((tmp_path / "out").glob("*.png"))
