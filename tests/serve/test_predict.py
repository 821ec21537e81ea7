"""From a finished run's folder to labels: the run's own scores, the merged model, and files."""

from __future__ import annotations

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.data import load_splits
from tests.sweeps.conftest import make_config, reviews_file
from tests.train.test_completion_training import make_config as completion_config

__all__ = ["make_config", "reviews_file"]


@pytest.fixture(scope="module")
def cell(make_config, tmp_path_factory):
    """A run of tiny-bert on two classes, and its config."""
    folder, config = tmp_path_factory.mktemp("runs"), make_config({"train.num_steps": 6})
    lj.train(config, folder, "first", progress=False)
    return folder / "cells" / "first", config


def plain_logits(cell, texts):
    """Merge, then the plain model on each text alone, unpadded: (N, classes) float32."""
    adapted = lj.load_adapter(cell)
    params = adapted.method.merge(adapted.trainable, adapted.frozen)
    rows, apply = [], jax.jit(adapted.model.apply)
    for text in texts:
        ids = jnp.array([adapted.model.tokenizer.encode(text).ids])
        rows.append(np.asarray(apply(params, ids, jnp.ones_like(ids)))[0])
    return np.stack(rows)


def test_predictions_of_the_test_split_are_those_that_the_run_saved(cell):
    cell, config = cell
    splits = load_splits(config.data)
    found = lj.predict(cell, splits.test.texts)
    with np.load(cell / "test_predictions.npz") as saved:
        loss, correct, label = saved["loss"], saved["correct"], saved["label"]
    assert found.class_names == splits.label_names == ("0", "1")
    at_label = found.probabilities[np.arange(len(label)), label]
    np.testing.assert_allclose(-np.log(at_label), loss, atol=1e-5)
    wanted = [splits.label_names[k] for k in label]
    assert [got == asked for got, asked in zip(found, wanted, strict=True)] == correct.tolist()
    assert set(label) == {0, 1}  # or the test could not see a column exchanged


@pytest.mark.parametrize("merged", [False, True])
def test_probabilities_equal_merge_then_plain_apply(cell, merged):
    cell, _ = cell
    texts = ["a lovely film", "a dull story with an awful actor", "a boring movie"]
    found = lj.predict(cell, texts, merged=merged)
    logits = plain_logits(cell, texts).astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, wanted, atol=2e-6)
    assert list(found) == [found.class_names[k] for k in logits.argmax(-1)]
    assert found.probabilities.shape == (3, 2) and len(found) == 3


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_file_keeps_its_columns_and_gets_classes_and_probabilities(
    cell, tmp_path, capsys, ending
):
    cell, _ = cell
    texts = ["a lovely film", "awful, dull"]
    data, out = tmp_path / "new.csv", tmp_path / f"labels.{ending}"
    with open(data, "w", newline="") as file:
        csv.writer(file).writerows([("id", "body"), *enumerate(texts)])
    wanted = list(lj.predict(cell, texts).rows())
    asked = ["predict", str(cell), f"--data={data}", f"--out={out}", "--text=body"]
    assert main(asked) == 0
    assert "2 predictions are in" in capsys.readouterr().out
    if ending == "parquet":
        rows = pyarrow.parquet.read_table(out).to_pylist()
    elif ending == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = list(csv.DictReader(out.open(), delimiter="\t" if ending == "tsv" else ","))
    names = ["id", "body", "prediction", "probability_0", "probability_1"]
    assert [list(row) for row in rows] == [names, names]
    for row, text, own in zip(rows, texts, wanted, strict=True):
        assert (row["body"], row["prediction"]) == (text, own["prediction"])
        for name in names[3:]:
            assert float(row[name]) == pytest.approx(own[name], abs=1e-6)
    assert main([*asked, "--json"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*asked, "--json", "--force"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "n": 2, "classes": ["0", "1"], "out": str(out)
    }  # fmt: skip


def test_texts_on_the_command_line_are_answered_without_files(cell, capsys):
    cell, _ = cell
    assert main(["predict", str(cell), "--texts", "a fine film", "dull", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in found["rows"]] == ["a fine film", "dull"]
    assert found["n"] == 2 and {row["prediction"] for row in found["rows"]} <= {"0", "1"}


def test_what_cannot_be_done_is_one_line_and_writes_nothing(cell, tmp_path, capsys, monkeypatch):
    cell, _ = cell
    data, out = tmp_path / "new.jsonl", tmp_path / "labels.csv"
    data.write_text('{"text": "a film"}\n{"text": " "}\n')

    def refused(*options, match):
        assert main(["predict", str(cell), f"--out={out}", *options]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and match in lines[0], lines
        assert not out.exists()

    refused(f"--data={data}", match="new.jsonl:2: column 'text' is empty")
    refused(f"--data={data}", "--text=body", match="no column 'body'")
    refused(f"--data={tmp_path / 'none.csv'}", match="none.csv")
    refused("--texts", "a", "--out=labels.xls", match=".jsonl, .csv")
    data.write_text('{"text": "a film", "prediction": 1}\n')
    refused(f"--data={data}", match="has a column 'prediction' already")
    refused("--texts", "a", "--num-beams=4", match="is for completions")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((cell / "config.json").read_text())
    assert main(["predict", str(tmp_path / "half"), "--texts", "a"]) == 2
    assert "is not finished" in capsys.readouterr().err

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_jax.data.tables.csv.writer", full)
    data.write_text('{"text": "a film"}\n')
    refused(f"--data={data}", match="No space left on device")
    assert [file.name for file in tmp_path.iterdir() if "labels" in file.name] == []


def test_progress_counts_every_input_once(cell):
    cell, _ = cell
    seen = []
    texts = ["good film"] * 30
    lj.predict(cell, texts, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30) and seen == sorted(set(seen)) and len(seen) > 1


def test_a_regression_gives_the_numbers_of_the_merged_model(make_config, tmp_path):
    data = tmp_path / "numbers.jsonl"
    words = ["good", "bad", "fine", "dull"]
    rows = [{"text": f"{words[n % 4]} film {n}", "label": n / 7} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.path": str(data), "train.num_steps": 4}
    config = make_config({**changes, "model.head": "regression", "model.num_labels": 1})
    lj.train(config, tmp_path, progress=False)
    cell, texts = tmp_path / "cells" / "run", ["good film", "dull story"]
    found = lj.predict(cell, texts)
    np.testing.assert_allclose(list(found), plain_logits(cell, texts)[:, 0], atol=2e-6)
    assert found.probabilities is None and found.class_names == ()
    assert list(found.rows())[0] == {"text": "good film", "prediction": found[0]}


def test_pairs_of_a_glue_task_are_read_as_in_training(make_config, tmp_path, capsys):
    data = {"data.source": "tiny-glue", "data.path": "", "data.task": "mrpc"}
    config = make_config({**data, "model.num_labels": 2, "train.num_steps": 3})
    lj.train(config, tmp_path, progress=False)
    cell, test = tmp_path / "cells" / "run", load_splits(config.data).test
    pairs = list(zip(test.texts, test.seconds, strict=True))
    with np.load(cell / "test_predictions.npz") as saved:
        loss, label = saved["loss"], saved["label"]
    found = lj.predict(cell, pairs)
    at_label = found.probabilities[np.arange(len(label)), label]
    np.testing.assert_allclose(-np.log(at_label), loss, atol=1e-5)
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    rows = [dict(zip(("#1 String", "#2 String"), pair, strict=True)) for pair in pairs[:3]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", str(cell), f"--data={data}", f"--out={out}"]) == 0
    read = [json.loads(line) for line in out.read_text().splitlines()]
    for row, wanted in zip(read, found.probabilities, strict=False):
        np.testing.assert_allclose([row["probability_0"], row["probability_1"]], wanted, atol=1e-6)
    capsys.readouterr()
    assert main(["predict", str(cell), "--texts", "one text"]) == 2
    assert "this run reads a pair of texts" in capsys.readouterr().err


def test_a_language_model_gives_the_completions_of_the_merged_model(tmp_path):
    lj.train(completion_config({"train.num_steps": 4}), tmp_path, progress=False)
    cell, prompts = tmp_path / "cells" / "run", ["a film", "the story is"]
    found = lj.predict(cell, prompts, settings=lj.Decoding(8))
    adapted = lj.load_adapter(cell)
    params = adapted.method.merge(adapted.trainable, adapted.frozen)
    # As the run was trained: an end of text closes each prompt.
    closed = [f"{prompt}<|endoftext|>" for prompt in prompts]
    answers = lj.generate(adapted.model, params, closed, lj.Decoding(8))
    assert list(found) == [answer.strip() for answer in answers]
    base = lj.generate(adapted.model, adapted.model.params, closed, lj.Decoding(8))
    assert list(found) != [answer.strip() for answer in base]


def test_an_adapter_with_its_base_given_is_the_one_that_loads_its_base(cell):
    cell, config = cell
    alone = lj.load_adapter(cell)
    model = lj.load_model("tiny-bert", "classification", 2, head_key=jax.random.key(5))
    given = lj.load_adapter(cell / "adapter", model)
    ids = jnp.arange(6, 18).reshape(2, 6)
    outputs = [one.model.apply(one.params, ids, jnp.ones_like(ids)) for one in (alone, given)]
    np.testing.assert_array_equal(*outputs)
    embedding = given.model.params["embeddings"]["word"]["embedding"]
    assert embedding is model.params["embeddings"]["word"]["embedding"]  # not a copy
    with pytest.raises(lj.RequestError, match="head='classification', num_labels=2"):
        lj.load_adapter(cell, lj.load_model("tiny-bert"))
    with pytest.raises(lj.RequestError, match="knows its base"):
        lj.load_adapter(cell, "tiny-bert")
