"""Runs kept without their weights: a report of them says the same."""

import shutil

import pytest

from lora_jax.core.errors import RequestError
from lora_jax.report.export import keep_runs
from lora_jax.report.page import Beside, to_page
from lora_jax.report.rendering import to_json
from lora_jax.report.runs import read_runs
from lora_jax.report.tables import summarise


def summary_of(folder):
    return summarise(read_runs(folder), num_resamples=50)


def test_kept_runs_give_the_same_table_and_nothing_else_is_copied(tmp_path, write_study):
    study = write_study(tmp_path / "study")
    cell = next((study / "cells").iterdir())
    (cell / "adapter").mkdir()
    (cell / "adapter" / "trainable.safetensors").write_bytes(b"weights")
    count = keep_runs(study, tmp_path / "kept")
    assert count == len([run for run in read_runs(study) if run.finished]) > 1
    names = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert names == {"card.json", "metrics.jsonl", "test_predictions.npz"}
    finished_only = [run for run in read_runs(study) if run.finished]
    expected = summarise(finished_only, num_resamples=50)
    assert to_json(summary_of(tmp_path / "kept")) == to_json(expected)
    # Again, into the same place: nothing to do, nothing wrong.
    assert keep_runs(study, tmp_path / "kept") == count


def test_another_run_of_that_name_is_not_overwritten(tmp_path, write_study):
    study = write_study(tmp_path / "study")
    keep_runs(study, tmp_path / "kept")
    card = next((tmp_path / "kept" / "cells").glob("*/card.json"))
    before = card.read_text().replace('"seed": 0', '"seed": 7') + " "
    card.write_text(before)
    missing = next(p for p in (tmp_path / "kept" / "cells").iterdir() if p != card.parent)
    shutil.rmtree(missing)
    with pytest.raises(RequestError, match=card.parent.name):
        keep_runs(study, tmp_path / "kept")
    assert card.read_text() == before
    assert not missing.exists(), "refused means that nothing is copied"


def test_nothing_finished_is_said(tmp_path, write_run):
    write_run(tmp_path / "study", "a", finished=False)
    with pytest.raises(RequestError, match="has finished"):
        keep_runs(tmp_path / "study", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_other_runs_stand_beside_labelled_and_apart(tmp_path, write_study):
    mine, other = write_study(tmp_path / "mine"), write_study(tmp_path / "full<size>")
    page = to_page(summary_of(mine), mine, Beside(other, summary_of(other)))
    alone = to_page(summary_of(mine), mine)
    assert page.count("<table>") > alone.count("<table>")
    assert "For comparison: full&lt;size&gt;" in page and "not part of those above" in page
    assert "For comparison" not in alone
