"""Grouping by settings, choosing rates on validation, and the table in each of its formats."""

import csv
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from lora_jax.core.errors import RequestError
from lora_jax.report.quantities import bytes_text, count_text, rate_text, seconds_text
from lora_jax.report.rendering import _inert, to_csv, to_json, to_latex, to_markdown, to_terminal
from lora_jax.report.runs import read_runs
from lora_jax.report.statistics import mean_interval, paired_difference
from lora_jax.report.tables import summarise


def summary_of(folder, **options):
    """The summary of a working folder, with few resamples."""
    return summarise(read_runs(folder), **{"num_resamples": 200, **options})


def test_runs_that_differ_by_seed_make_one_row(tmp_path, write_study):
    summary = summary_of(write_study(tmp_path))
    assert [row.label for row in summary.rows] == [
        "head only",
        "LoRA q,v r=1",
        "LoRA q,v r=8",
        "LoRA all-linear r=8",
        "full fine-tuning",
    ]
    assert all(row.seeds == (0, 1, 2) for row in summary.rows)
    assert summary.basins == () and summary.warnings == ()


def test_a_row_holds_the_means_and_intervals_of_its_runs(tmp_path, write_study):
    runs = {run.name: run for run in read_runs(write_study(tmp_path))}
    row = summary_of(tmp_path, seed=3).rows[2]
    correct = np.stack([runs[f"lora-qv-r8-s{seed}"].predictions.correct for seed in range(3)])
    full = np.stack([runs[f"full-s{seed}"].predictions.correct for seed in range(3)])
    drawn = {"seed": 3, "num_resamples": 200}
    index = np.arange(400)
    assert row.accuracy == mean_interval(correct, **drawn)
    assert row.versus["full"] == paired_difference(
        correct.astype(float),
        full.astype(float),
        first_index=index,
        second_index=index,
        first_seeds=range(3),
        second_seeds=range(3),
        **drawn,
    )
    assert row.test_accuracy == pytest.approx(np.mean(row.seed_accuracies))
    assert row.adapter_count == 8 * 4608 and row.head_count == 770
    assert row.versus["head"].low > 0


def test_settings_without_a_meaning_for_the_method_do_not_split_its_row(tmp_path, write_run):
    for rank in (1, 8):
        settings = {"method.name": "head", "method.rank": rank, "seed": rank}
        write_run(tmp_path, f"head-{rank}", settings=settings)
    (row,) = summary_of(tmp_path).rows
    assert (row.label, row.rank, row.targets, row.seeds) == ("head only", None, None, (1, 8))


def test_other_settings_that_differ_tell_rows_apart(tmp_path, write_run):
    for alpha in (8.0, 16.0):
        write_run(tmp_path, f"alpha-{alpha}", settings={"method.alpha": alpha})
    labels = {row.label for row in summary_of(tmp_path).rows}
    assert labels == {"LoRA q,v r=8 (alpha=8.0)", "LoRA q,v r=8 (alpha=16.0)"}


def test_bookkeeping_does_not_tell_rows_apart_and_a_repeat_counts_once(tmp_path, write_run):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", settings={"train.log_every_steps": 1})
    summary = summary_of(tmp_path)
    (row,) = summary.rows
    assert [run.name for run in row.runs] == ["a"]
    assert summary.warnings == ("b repeats a (same settings, same seed): counted once",)


def test_the_rate_is_chosen_on_validation_even_where_test_disagrees(tmp_path, write_run):
    for rate, validation, correct in ((1e-4, 0.6, 4), (1e-3, 0.5, 1), (1e-2, 0.55, 3)):
        write_run(
            tmp_path,
            f"lr{rate}",
            settings={"optimizer.lr": rate},
            validation_loss=validation,
            correct=np.arange(4) < correct,
        )
    summary = summary_of(tmp_path)
    (row,), (basin,) = summary.rows, summary.basins
    assert (row.lr, row.rates_tried, row.test_accuracy) == (1e-3, 3, 0.25)
    assert basin.rates == (1e-4, 1e-3, 1e-2) and basin.losses == (0.6, 0.5, 0.55)
    assert (basin.chosen, basin.low, basin.high, basin.at_edge) == (1e-3, 1e-3, 1e-3, False)


def test_rates_are_compared_on_the_seeds_they_share(tmp_path, write_run):
    # Seed 1 is easy and was run at the worse rate only: a plain mean would choose that rate.
    for rate, seed, validation in ((1e-3, 0, 0.50), (1e-2, 0, 0.52), (1e-2, 1, 0.30)):
        settings = {"optimizer.lr": rate, "seed": seed}
        write_run(tmp_path, f"{rate}-{seed}", settings=settings, validation_loss=validation)
    assert summary_of(tmp_path).rows[0].lr == 1e-3


def test_a_diverged_rate_is_never_chosen_and_an_edge_is_told(tmp_path, write_run):
    for rate, validation in ((1e-4, 0.50), (1e-3, 0.505), (1e-2, float("nan"))):
        settings = {"optimizer.lr": rate}
        write_run(tmp_path, f"{rate}", settings=settings, validation_loss=validation)
    summary = summary_of(tmp_path)
    (basin,) = summary.basins
    assert (basin.chosen, basin.low, basin.high) == (1e-4, 1e-4, 1e-3)
    assert basin.at_edge and "at the edge" in summary.warnings[0]
    assert json.loads(to_json(summary))["basins"][0]["validation_losses"] == [0.5, 0.505, None]


def test_a_variants_loss_is_paired_with_plain_loras_on_the_same_targets(tmp_path, write_run):
    """The interval is that of the differences example by example; other targets do not count."""
    rng = np.random.default_rng(0)
    difficulty = rng.exponential(size=300)
    runs = {
        "lora": ({}, difficulty),
        "other-targets": ({"method.targets": "all-linear"}, difficulty / 2),
        "dora": ({"method.name": "dora"}, difficulty + 0.01 * rng.normal(size=300) - 0.05),
        "vera-all": ({"method.name": "vera", "method.targets": "q"}, difficulty),
        "full": ({"method.name": "full"}, difficulty),
    }
    for name, (settings, loss) in runs.items():
        write_run(tmp_path, name, settings=settings, loss=loss, correct=np.ones(300, bool))
    rows = {row.runs[0].name: row for row in summary_of(tmp_path).rows}
    found = rows.pop("dora").loss_vs_lora
    assert all(row.loss_vs_lora is None for row in rows.values())
    expected = (np.float32(runs["dora"][1]) - np.float32(runs["lora"][1])).mean(dtype=np.float64)
    assert found.estimate == pytest.approx(expected, abs=1e-6)
    assert found.low < found.estimate < found.high < -0.045  # unpaired, it would be 0.2 wide
    assert found.high - found.low < 0.005
    text = to_markdown(summary_of(tmp_path))
    assert "loss vs LoRA, nats" in text and "−0.05" in text


def test_runs_on_other_data_are_not_compared(tmp_path, write_run):
    write_run(tmp_path, "lora")
    settings = {"method.name": "full"}
    write_run(tmp_path, "full", settings=settings, card={"data_hash": "e" * 64}, index=[5, 6, 7, 8])
    summary = summary_of(tmp_path)
    assert all(row.versus["full"] is None for row in summary.rows)
    assert summary.references == () and "different data" in summary.warnings[0]


def test_one_data_hash_with_other_test_examples_is_an_error(tmp_path, write_run):
    write_run(tmp_path, "s0")
    write_run(tmp_path, "s1", settings={"seed": 1}, index=[0, 1, 2, 9])
    with pytest.raises(RequestError, match="different test examples"):
        summary_of(tmp_path)


def test_a_card_that_contradicts_its_predictions_is_told(tmp_path, write_run):
    path = write_run(tmp_path, "run") / "card.json"
    card = json.loads(path.read_text())
    card["metrics"]["test"]["accuracy"] = 0.9
    path.write_text(json.dumps(card))
    summary = summary_of(tmp_path)
    assert "card.json says test accuracy 0.9" in summary.warnings[0]
    assert summary.rows[0].test_accuracy == 0.75


def test_a_run_without_predictions_has_a_row_without_intervals(tmp_path, write_run):
    (write_run(tmp_path, "run") / "test_predictions.npz").unlink()
    summary = summary_of(tmp_path)
    assert summary.rows[0].accuracy is None and summary.rows[0].test_accuracy == 0.75
    assert "no intervals" in summary.warnings[0]
    assert "| 75.0 |" in to_markdown(summary)


def test_unfinished_runs_stand_apart(tmp_path, write_run):
    write_run(tmp_path, "done")
    write_run(tmp_path, "going", finished=False)
    summary = summary_of(tmp_path)
    assert [run.name for run in summary.unfinished] == ["going"] and len(summary.rows) == 1


def test_csv_and_json_hold_the_numbers_unrounded(tmp_path, write_study):
    summary = summary_of(write_study(tmp_path))
    records = list(csv.DictReader(io.StringIO(to_csv(summary))))
    for row, record, item in zip(
        summary.rows, records, json.loads(to_json(summary))["rows"], strict=True
    ):
        assert float(record["test_loss_low"]) == item["test_loss_low"] == row.loss.low
        assert int(record["adapter_parameters"]) == row.adapter_count
    assert records[-1]["accuracy_vs_full"] == "" and records[0]["accuracy_vs_head"] == ""


def test_markdown_and_latex_have_a_cell_for_every_column(tmp_path, write_study):
    summary = summary_of(write_study(tmp_path))
    lines = to_markdown(summary).splitlines()
    assert len(lines) == 2 + 5 and {line.count("|") for line in lines} == {13}
    body = to_latex(summary).split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 5 and {line.count("&") for line in body} == {11}


HOSTILE = "[red]x|`$_{\\& %#<b>](y)"


def test_settings_cannot_break_out_of_a_format(tmp_path, write_run):
    write_run(tmp_path, "run", settings={"method.targets": HOSTILE})
    summary = summary_of(tmp_path)
    console = Console(width=200, file=io.StringIO())
    console.print(to_terminal(summary))
    assert HOSTILE in console.file.getvalue()
    row = to_markdown(summary).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", row)) == 11 and "<b>" not in row.replace("\\<", "")
    latex = to_latex(summary)
    assert r"[red]x|`\$\_\{\textbackslash{}\& \%\#<b>](y)" in latex
    assert next(csv.DictReader(io.StringIO(to_csv(summary))))["targets"] == HOSTILE


def test_terminal_table_fits_a_hundred_columns(tmp_path, write_study):
    console = Console(width=100, file=io.StringIO())
    console.print(to_terminal(summary_of(write_study(tmp_path))))
    text = console.file.getvalue()
    assert "…" not in text and "LoRA" in text and re.search(r"\[\d\.\d{3}, \d\.\d{3}\]", text)


def test_quantities_are_written_for_people():
    assert [count_text(n) for n in (0, 770, 1536, 73_728, 999_950, 22_713_216)] == [
        "0",
        "770",
        "1.5 k",
        "73.7 k",
        "1 M",
        "22.7 M",
    ]
    assert [bytes_text(n) for n in (None, 900, 295_812)] == ["–", "900 B", "296 kB"]
    assert [rate_text(r) for r in (None, 0.0, 1e-3, 5e-5, 2.5e-4, 1.0)] == [
        "–",
        "0",
        "1e-3",
        "5e-5",
        "2.5e-4",
        "1e0",
    ]
    assert [seconds_text(s) for s in (4.21, 73, 720, 9000)] == ["4.2 s", "73 s", "12 min", "2.5 h"]


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+x", "-x", "@x", "\t=x"])
def test_a_text_that_a_spreadsheet_would_execute_is_made_inert(text):
    assert _inert(text) == f"'{text}"
    assert _inert("-0.5") == "-0.5" and _inert(-0.5) == -0.5 and _inert("q,v") == "q,v"
