"""The statistics of the second edition, against simulation, planted truths and by hand."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import recompute
from experiments.analysis import collapse, evidence, findings, index, pages, rounding, study
from experiments.analysis import predictions as predictions_file
from experiments.analysis.evidence import Claim, Evidence, crossed, decide, power_of
from lora_jax.core.errors import RequestError

ROOT = Path(__file__).parents[2]
ABOVE, EQUAL = (Claim(kind, "…", kind, 0.02) for kind in ("above", "equivalent"))


def table(rng, seeds, examples, mean=0.0, seed_sd=0.02, example_sd=0.3, rest=0.2):
    rows = seed_sd * rng.normal(size=(seeds, 1)) + example_sd * rng.normal(size=(1, examples))
    return mean + rows + rest * rng.normal(size=(seeds, examples))


@pytest.mark.parametrize(
    ("seeds", "examples", "seed_sd", "example_sd"),
    [(10, 200, 0.02, 0.3), (5, 50, 0.0, 0.3), (3, 100, 0.1, 0.0), (10, 400, 0.005, 0.01)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, examples, seed_sd, example_sd):
    rng = np.random.default_rng(0)
    num = 1500
    hits = 0
    for _ in range(num):
        found = crossed(table(rng, seeds, examples, seed_sd=seed_sd, example_sd=example_sd))
        interval = found.interval(0.95)
        hits += interval.low <= 0 <= interval.high
    # Never short of the level by more than the simulation's own error (3 standard errors).
    assert hits / num > 0.95 - 3 * math.sqrt(0.95 * 0.05 / num)


def test_the_error_is_that_of_both_parts_and_counts_the_rest_once():
    rng = np.random.default_rng(1)
    true = math.sqrt(0.02**2 / 10 + 0.3**2 / 400 + 0.2**2 / 4000)
    errors = [crossed(table(rng, 10, 400)).error for _ in range(300)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(true, rel=0.03)


def test_one_seed_leaves_the_examples():
    rows = np.random.default_rng(0).normal(size=(1, 50))
    t = stats.ttest_1samp(rows[0], 0.0).confidence_interval(0.95)
    assert crossed(rows).interval().low == pytest.approx(t.low)
    assert crossed(rows).interval().high == pytest.approx(t.high)


def test_one_number_per_seed_is_students():
    values = [0.1, 0.3, 0.25, 0.2]
    t = stats.ttest_1samp(values, 0.05, alternative="greater")
    found = evidence.over_seeds(values)
    assert found.p_above(0.05) == pytest.approx(t.pvalue)
    assert found.interval(0.9).low == pytest.approx(
        stats.ttest_1samp(values, 0).confidence_interval(0.9).low
    )


@pytest.mark.parametrize(
    ("estimate", "error", "above", "equal"),
    [
        (0.10, 0.01, evidence.HOLDS, evidence.REFUTED),
        (0.00, 0.003, evidence.REFUTED, evidence.HOLDS),
        (0.02, 0.003, evidence.INCONCLUSIVE, evidence.INCONCLUSIVE),
        (-0.10, 0.01, evidence.REVERSE, evidence.REFUTED),
        (-0.02, 0.003, evidence.REFUTED, evidence.INCONCLUSIVE),
        (0.00, 0.1, evidence.INCONCLUSIVE, evidence.INCONCLUSIVE),
    ],
)
def test_a_verdict_follows_the_interval_and_knows_the_reverse(estimate, error, above, equal):
    found = Evidence(estimate, error, 9)
    verdicts = [decide(claim, found) for claim in (ABOVE, EQUAL)]
    assert [one.verdict for one in verdicts] == [above, equal]
    for one in verdicts:  # the p-value is of the same test
        assert (one.p < 0.05) == (one.verdict == evidence.HOLDS)
        assert one.low <= estimate <= one.high
    assert decide(ABOVE, found, spoilt="seed 3 collapsed").verdict == evidence.INCONCLUSIVE
    least = decide(Claim("n", "…", "not_above", 0.02), found)
    assert (least.verdict == evidence.HOLDS) == (least.high < 0.02)


def test_holm_is_the_textbooks():
    assert evidence.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evidence.holm([]) == [] and evidence.holm([0.9, 0.8]) == [1.0, 1.0]
    found = evidence.with_holm([decide(ABOVE, Evidence(0.05, 0.0122, 9)) for _ in range(3)])
    assert all(v.p < 0.05 < v.holm for v in found)
    assert pages.verdict_table(found).count("(not after Holm)") == 3


@pytest.mark.parametrize("kind", ["above", "equivalent", "not_above"])
def test_power_is_how_often_a_simulated_study_finds_it(kind):
    rng = np.random.default_rng(2)
    true, margin = (0.05, 0.02) if kind == "above" else (0.003, 0.02)
    spread = {"seed_sd": 0.02, "example_sd": 0.1}
    said = power_of(kind, margin, true, seeds=8, examples=300, **spread)
    claim, found, num = Claim("n", "…", kind, margin), 0, 600
    for _ in range(num):
        rows = table(rng, 8, 300, mean=true, rest=0.0, **spread)
        found += decide(claim, crossed(rows)).verdict == evidence.HOLDS
    # Student's with fewer degrees of freedom than Satterthwaite's: never promises too much.
    assert 0.2 < said < found / num + 0.06


def write_study(folder, *, dead=False, seeds=(0, 1, 2)):
    """A study of two arms, as `collect` writes it, without any run."""
    rng, folder = np.random.default_rng(0), folder / "made_up"
    folder.mkdir()
    label = rng.integers(0, 4, 60)
    tuned, rows, predictions = {}, [], {}
    for number, name in enumerate(("one", "other")):
        key = "optimizer.lr"
        losses = [[0.7, 0.8], [0.5, 0.55], [0.6, 0.52]]
        tuned[name] = {"key": key, "values": [1e-3, 2e-3, 4e-3], "seed": [100, 101],
                       "chosen": 2e-3, "by_seed": losses,
                       "validation_losses": np.mean(losses, axis=1).tolist()}  # fmt: skip
        for seed in seeds:
            cell = f"{name}-lr0.002-s{seed}"
            loss = rng.gamma(2.0, 0.25, 60) + 0.1 * number
            loss = np.full(60, math.log(4)) if dead and seed == 2 and number else loss
            rows.append({"cell": cell, "arm": name, "lr": 2e-3, "head_lr": 0.0, "seed": seed,
                         "tuning": False, "point": [2e-3], "adapter_parameters": 8})  # fmt: skip
            predictions[cell] = predictions_file.Kept(
                loss, rng.random(60) > 0.5, label, np.arange(60), np.ones(60)
            )
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tuned.json").write_text(json.dumps(tuned))
    study._write_bytes(folder / "predictions.npz", predictions_file.packed(predictions))
    return folder, predictions


def test_a_study_reads_back_what_its_predictions_were(tmp_path):
    folder, predictions = write_study(tmp_path)
    found = study.read_study(folder)
    one = found["one"]
    assert one.seeds == (0, 1, 2) and one.chosen == (2e-3,) and not one.at_edge
    assert one.choices == ((2e-3,), (4e-3,))
    for row, seed in enumerate(one.seeds):
        kept = predictions[f"one-lr0.002-s{seed}"]
        np.testing.assert_allclose(one.losses[row], kept.loss, rtol=5e-4)
        np.testing.assert_array_equal(one.right[row], kept.correct)
    share = np.bincount(kept.label) / 60
    assert one.prior == pytest.approx(stats.entropy(share))
    exact = np.stack([predictions[f"one-lr0.002-s{s}"].loss for s in range(3)])
    other = np.stack([predictions[f"other-lr0.002-s{s}"].loss for s in range(3)])
    difference = pages.difference(one, found["other"])
    assert difference.estimate == pytest.approx((exact - other).mean(), abs=1e-4)
    with pytest.raises(RequestError, match="no arm 'oen'.*'one'"):
        found["oen"]


def test_a_collapsed_run_is_named_and_leaves_no_verdict(tmp_path):
    folder, _ = write_study(tmp_path, dead=True)
    found = study.read_study(folder)
    assert found["other"].collapsed == (2,) and found["one"].collapsed == ()
    verdict = pages.compare(ABOVE, found["other"], found["one"])
    assert verdict.verdict == evidence.INCONCLUSIVE and "seed 2 collapsed" in verdict.note
    assert "1 collapsed" in pages.arm_table([found["other"]])
    assert "no: 2e-3; 4e-3" in pages.arm_table([found["one"]])


def test_a_negative_margin_has_no_reverse():
    claim = Claim("n", "…", "above", -1.0)
    assert decide(claim, Evidence(-3.0, 0.1, 9)).verdict == evidence.REFUTED
    assert decide(claim, Evidence(3.0, 0.1, 9)).verdict == evidence.HOLDS


def test_the_rate_at_which_adapters_die_is_found_again():
    """Deaths drawn from rate ∝ alpha^-0.6 · rank^-0.1, with some slope of the cliff."""
    rng, rows = np.random.default_rng(0), []
    for rank in (1, 4, 16, 64):
        for alpha in (4, 16, 64):
            half = -1.0 - 0.6 * math.log10(alpha) - 0.1 * math.log10(rank)
            for rate in -2.4 + 0.2 * np.arange(8):
                for seed in range(10):
                    died = rng.random() < 1 / (1 + math.exp(-15 * (rate - half)))
                    rows.append({"rate": rate, "alpha": math.log10(alpha),
                                 "rank": math.log10(rank), "seed": seed, "died": died})  # fmt: skip
    for part, true in ((0, 0.6), (1, 0.1), (2, -1.0)):
        interval = collapse.exponent(rows, part).interval(0.99)
        assert interval.low < true < interval.high
        assert interval.high - interval.low < 0.3
    assert all(math.isnan(x) for x in collapse.fit([row | {"died": True} for row in rows]))


@pytest.mark.parametrize("true", [0.01, 1.0])
def test_the_ratio_of_variances_is_found_again(true):
    rng = np.random.default_rng(0)
    tables = [
        rng.normal(size=(6, 1)) + math.sqrt(true) * rng.normal(size=(6, 6)) for _ in range(200)
    ]
    found = np.median([rounding.log_ratio(table) for table in tables])
    assert found == pytest.approx(math.log10(true), abs=0.15)
    hits = [rounding.ratio(t).interval(0.95) for t in tables]
    assert np.mean([i.low < math.log10(true) < i.high for i in hits]) > 0.85


@pytest.mark.parametrize("name", index.SECOND)
def test_each_registered_hypothesis_gets_a_verdict_and_no_other_does(name):
    """The docstring's list and the claims of the analysis have the same names, in its order."""
    text = findings.source_of(name).read_text(encoding="utf-8")
    registered = re.findall(r"^- (\w+(?:, \w+)*):", text[text.index("Hypotheses,") :], re.M)
    names = [one for line in registered for one in line.split(", ")]
    code = (ROOT / "experiments" / "analysis" / f"{name}.py").read_text(encoding="utf-8")
    claimed = re.findall(r'(?:[cC]laim|_equal)\(\s*"(\w+)"', code)
    claimed += re.findall(
        r'^        \("(\w+)", "[^"]{12,}"', code, re.M
    )  # rows of a table of claims
    assert sorted(names) == sorted(claimed) and names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["what_rank_2", "batch_size_2", "what_rank_e2e_2", "collapse"])
def test_a_smoke_sweep_becomes_a_page_that_recomputes(name, tmp_path):
    runs, out = str(tmp_path / "runs"), tmp_path / name
    sweep = ["sweep", f"--config={name}", "--sweep=smoke", f"--workdir={runs}", "--no-progress"]
    for command in (["lora_jax", *sweep], ["experiments.analysis", name, runs, f"--out={out}"]):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    assert "| arm |" in (out / "README.md").read_text() or name == "collapse"
    assert recompute.recompute(name, out) == []


@pytest.mark.parametrize("name", recompute.studies())
def test_a_committed_page_equals_what_its_files_give(name):
    assert recompute.recompute(name) == []
