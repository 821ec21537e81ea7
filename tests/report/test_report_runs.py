"""Reading a working folder: whole runs, runs still going, and files that are broken."""

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.report.runs import read_runs


def test_runs_come_back_by_name_with_what_was_written(tmp_path, write_run):
    write_run(tmp_path, "b", loss=[0.5, 0.25], correct=[True, False], num_steps=80)
    write_run(tmp_path, "a", settings={"method.rank": 4})
    a, b = read_runs(tmp_path)
    assert (a.name, b.name) == ("a", "b")
    assert a.finished and a.config["method"]["rank"] == 4
    assert b.predictions.loss.tolist() == [0.5, 0.25]
    assert b.card.metrics.test.accuracy == 0.5
    steps, losses = b.curve("validation")
    assert steps.tolist() == list(range(0, 81, 10)) and losses.shape == (9,)
    assert b.curve("test")[0].shape == (0,)


def test_predictions_are_put_in_order_of_their_example(tmp_path, write_run):
    write_run(tmp_path, "run", index=[2, 0, 1], loss=[2.0, 0.0, 1.0], correct=[True, False, True])
    (run,) = read_runs(tmp_path)
    assert run.predictions.index.tolist() == [0, 1, 2]
    assert run.predictions.loss.tolist() == [0.0, 1.0, 2.0]
    assert run.predictions.correct.tolist() == [False, True, True]


def test_weights_and_shares_are_read_as_they_are(tmp_path, write_run):
    cell = write_run(tmp_path, "texts")
    arrays = {
        "loss": [2.0, 1.0, 4.0], "correct": [0.5, 0.25, 1.0], "label": [0, 0, 1],
        "index": [1, 0, 2], "weight": [1.0, 2.0, 3.0],
    }  # fmt: skip
    np.savez(cell / "test_predictions.npz", **arrays)
    (run,) = read_runs(tmp_path)
    assert run.predictions.correct.tolist() == [0.25, 0.5, 1.0]
    assert run.predictions.weight.tolist() == [2.0, 1.0, 3.0]
    assert run.predictions.mean("loss") == (2 * 1 + 1 * 2 + 3 * 4) / 6
    arrays["weight"] = [0.0, 1.0, 2.0]
    np.savez(cell / "test_predictions.npz", **arrays)
    with pytest.raises(RequestError, match="a weight is not above 0"):
        read_runs(tmp_path)


def test_without_weights_all_count_alike(tmp_path, write_run):
    write_run(tmp_path, "classes")
    (run,) = read_runs(tmp_path)
    assert run.predictions.weight.tolist() == [1.0] * len(run.predictions.index)
    assert run.predictions.correct.dtype == bool and run.predictions.label.dtype == np.int64


def test_a_run_still_going_is_read_as_far_as_it_got(tmp_path, write_run):
    cell = write_run(tmp_path, "going", finished=False)
    with open(cell / "metrics.jsonl", "a") as file:
        file.write('{"step": 102, "split": "tr')
    (cell.parent / ".next.abc.tmp").mkdir()
    (run,) = read_runs(tmp_path)
    assert not run.finished and run.status == "unfinished, at step 100"
    assert run.config["method"]["name"] == "lora"


def test_a_cell_without_any_file_is_unfinished(tmp_path):
    (tmp_path / "cells" / "new").mkdir(parents=True)
    (run,) = read_runs(tmp_path)
    assert (run.status, run.config, run.last_step) == ("unfinished, no step yet", {}, 0)


def test_of_a_step_logged_again_after_a_resume_the_later_counts(tmp_path, write_run):
    cell = write_run(tmp_path, "run", finished=False, num_steps=10)
    with open(cell / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "split": "train", "loss": 9.5}\n')
    steps, losses = read_runs(tmp_path)[0].curve("train")
    assert steps.tolist() == list(range(11)) and losses[5] == 9.5


def test_a_broken_line_amid_the_metrics_is_named(tmp_path, write_run):
    cell = write_run(tmp_path, "run")
    lines = (cell / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:10]
    (cell / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RequestError, match=r"metrics\.jsonl:4 is damaged"):
        read_runs(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}', b"\xff\xfe".decode("latin1")])
def test_a_card_that_is_none_is_named(tmp_path, write_run, text):
    path = write_run(tmp_path, "run") / "card.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=str(path)) as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value)


def test_malformed_predictions_are_named(tmp_path, write_run):
    path = write_run(tmp_path, "run") / "test_predictions.npz"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not an archive"):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=r"test_predictions\.npz is malformed"):
            read_runs(tmp_path)
    row = np.zeros(3)
    for arrays in (
        {"loss": row, "correct": row, "label": row},
        {"loss": row, "correct": row, "label": row, "index": np.arange(2)},
        {"loss": row, "correct": row, "label": row, "index": np.array([0, 1, 1])},
    ):
        np.savez(path, **arrays)
        with pytest.raises(RequestError, match=r"test_predictions\.npz is malformed"):
            read_runs(tmp_path)


def test_a_folder_that_is_no_working_folder_is_refused_with_the_way_out(tmp_path, write_run):
    with pytest.raises(RequestError, match="no folder .*nowhere"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="holds no runs"):
        read_runs(tmp_path)
    cell = write_run(tmp_path, "run")
    with pytest.raises(RequestError, match=f"one cell; give its working folder {tmp_path}"):
        read_runs(cell)
