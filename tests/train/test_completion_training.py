"""Causal language models trained on completions: alone, packed, again, reported; numbers too."""

import json

import jax
import numpy as np
import pytest

from lora_jax.cli.main import main
from lora_jax.cli.train import summary
from lora_jax.core.errors import RequestError
from lora_jax.data import TrainIterator, load_splits
from lora_jax.report.rendering import to_markdown, to_records
from lora_jax.report.runs import read_runs
from lora_jax.report.tables import summarise
from lora_jax.serve.adapters import load_adapter
from lora_jax.settings import Settings
from lora_jax.settings.config import run_file
from lora_jax.sweeps import Cell, Sweep, run_sweep
from lora_jax.sweeps.verify import verify
from lora_jax.train import Interrupted, train
from lora_jax.train.evaluate_run import evaluate_cell
from tests.train.results import results_of
from tests.train.test_resume import at_call, interrupt

CHANGES = {"train.eval_batch_size": 8, "optimizer.lr": 3e-3, "data.batch_size": 4}


def make_config(own=None, *, file="e2e_smollm2", arg="smoke"):
    config = run_file(file)["get_config"](arg)
    return Settings.from_config(config).replace({**CHANGES, **(own or {})})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two ranks of tiny-llama in one program, with dropout and smoothing as the config has them."""
    folder = tmp_path_factory.mktemp("completions")
    cells = [Cell(f"r{rank}", make_config({"method.rank": rank})) for rank in (1, 4)]
    results = run_sweep(Sweep("ranks", tuple(cells)), folder, progress=False)
    assert [results[name].program.K for name in ("r1", "r4")] == [2, 2]
    return folder


def test_predictions_are_those_of_the_merged_model_token_by_token(workdir):
    """Each example by itself, unpadded, through the plain model; in float64 from its logits on."""
    cell = workdir / "cells" / "r4"
    adapted = load_adapter(cell / "adapter")
    model, params = adapted.model, adapted.method.merge(adapted.trainable, adapted.frozen)
    test = load_splits(make_config().data, target="text").test
    with np.load(cell / "test_predictions.npz") as saved:
        saved = dict(saved)
    assert {name: array.dtype.name for name, array in saved.items()} == {
        "loss": "float32", "correct": "float32", "label": "int32", "index": "int64",
        "weight": "float32",
    }  # fmt: skip
    np.testing.assert_array_equal(saved["index"], np.arange(len(test)))
    apply, longest = jax.jit(model.apply), 96
    for number in (0, 7, 19):
        prompt = model.tokenizer.encode(test.texts[number]).ids
        said = model.tokenizer.encode(f" {test.seconds[number]}").ids
        tokens = [*prompt, model.eos_token_id, *said, model.eos_token_id]
        ids = np.zeros((1, longest), np.int32)
        ids[0, : len(tokens)] = tokens
        logits = np.asarray(apply(params, ids), np.float64)[0]  # causal: what follows is not seen
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(prompt), len(tokens) - 1)
        targets = ids[0, places + 1]
        assert saved["weight"][number] == len(said) + 1
        assert saved["loss"][number] == pytest.approx(-log_p[places, targets].mean(), abs=2e-5)
        right = np.mean(log_p[places].argmax(-1) == targets)
        assert saved["correct"][number] == pytest.approx(right)
    metrics = json.loads((cell / "card.json").read_text())["metrics"]["test"]
    assert metrics["tokens"] == saved["weight"].sum()
    for name, values in (("loss", saved["loss"]), ("accuracy", saved["correct"])):
        mean = np.average(values.astype(np.float64), weights=saved["weight"])
        assert metrics[name] == pytest.approx(mean, rel=1e-9)


def test_report_has_the_card_numbers_with_intervals(workdir):
    runs = read_runs(workdir)
    summary = summarise(runs, num_resamples=50)
    assert not [words for words in summary.warnings if "predictions" in words]
    for row in summary.rows:
        run = row.runs[0]
        assert row.test_loss == pytest.approx(run.card.metrics.test.loss, rel=1e-9)
        assert row.test_accuracy == pytest.approx(run.card.metrics.test.accuracy, rel=1e-9)
        assert row.loss.low < row.loss.estimate < row.loss.high


def test_verified_with_its_pack_bit_for_bit(workdir):
    verdicts = verify(workdir / "cells" / "r1", progress=False)
    assert [(v.cell, v.same, v.exact, v.differences) for v in verdicts] == [
        (name, True, True, ()) for name in ("r1", "r4")
    ]


def test_evaluated_again_on_any_split(workdir):
    cell = workdir / "cells" / "r4"
    metrics = json.loads((cell / "card.json").read_text())["metrics"]
    for merged in (False, True):
        found, _ = evaluate_cell(cell, split="validation", merged=merged)
        assert found.loss == pytest.approx(metrics["validation"]["loss"], rel=1e-5)


def test_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    train(make_config(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        at_call(patch, TrainIterator, "__next__", 3, interrupt)
        with pytest.raises(Interrupted):
            train(make_config(), tmp_path / "parts", progress=False)
    train(make_config(), tmp_path / "parts", progress=False)
    whole, parts = (results_of(tmp_path / name / "cells" / "run") for name in ("whole", "parts"))
    # Which checkpoints are left tells of the stop.
    assert {**whole, "steps": None} == {**parts, "steps": None}


def test_texts_are_scored_before_and_after_merged_or_not(workdir, capsys):
    cell = workdir / "cells" / "r4"
    argv = ["evaluate", str(cell), "--texts=3", "--max-new-tokens=5", "--json"]
    found = []
    for extra in ([], ["--merged"]):
        assert main([*argv, *extra]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert list(scores) == ["base", "r4"] and scores["r4"]["n"] == 3
        kept = json.loads((cell / "texts-test.json").read_text())
        assert kept["merged"] == bool(extra) and kept["decoding"]["max_new_tokens"] == 5
        found.append({name: one["texts"] for name, one in kept["answers"].items()})
    assert found[0] == found[1] and found[0]["base"] != found[0]["r4"]


def test_prompts_and_fused_kernels_of_gpt2_train(tmp_path):
    config = make_config(file="paper/e2e_gpt2", arg="gpt2-large,smoke")
    card = train(config, tmp_path, progress=False)
    # Two layers of width 32: query and value are slices of one kernel, rank 4 each.
    assert card.counts.to_json() == {"adapter": 2 * 2 * 4 * (32 + 32), "head": 0, "total": 1024}
    rows = (tmp_path / "cells" / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("tokens_per_s" in json.loads(r) for r in rows if '"train"' in r)


@pytest.mark.parametrize(
    ("task", "metric", "kind"), [("stsb", "pearson", "float32"), ("cola", "matthews", "int32")]
)
def test_task_metric_is_that_of_the_predictions_and_shown(tmp_path, capsys, task, metric, kind):
    config = make_config(file="paper/glue_roberta", arg=f"{task},smoke")
    card = train(config, tmp_path, progress=False)
    test = card.metrics.test.to_json()
    with np.load(tmp_path / "cells" / "run" / "test_predictions.npz") as saved:
        label, predicted = saved["label"], saved["prediction"]
        assert predicted.dtype.name == kind and "weight" not in saved
        spread = label.std() * predicted.std()
        wanted = np.mean((label - label.mean()) * (predicted - predicted.mean()))
        assert test[metric] == pytest.approx(wanted / spread if spread else 0.0, abs=1e-5)
        if task == "stsb":
            np.testing.assert_allclose(saved["loss"], (label - predicted) ** 2, rtol=1e-5)
            assert test["accuracy"] == pytest.approx(np.mean(np.abs(label - predicted) <= 0.5))
    (run,) = read_runs(tmp_path)
    assert run.predictions.label.dtype == (np.float64 if task == "stsb" else np.int64)
    share = "within 0.5 of the label" if task == "stsb" else "accuracy"
    shown = f"{share} {test['accuracy']:.4f}, {metric} {test[metric]:.4f} ("
    assert shown in summary(card, str(tmp_path), "run")
    assert main(["evaluate", str(run.folder)]) == 0 and shown in capsys.readouterr().out
    assert main(["evaluate", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[metric] == pytest.approx(test[metric], abs=1e-6)
    found = summarise([run], num_resamples=20)
    assert to_records(found)[0][f"test_{metric}"] == test[metric]
    headings = to_markdown(found).splitlines()[0]
    assert f"| test {metric} |" in headings
    assert ("| test share within 0.5, % |" in headings) == (task == "stsb")


@pytest.mark.slow
def test_cells_with_the_models_own_dropout_end_packed_where_they_end_alone(tmp_path):
    changes = {"train.num_steps": 3, "train.eval_every_steps": 3}
    configs = {}
    for seed in (0, 1):
        own = {**changes, "seed": seed}
        configs[f"s{seed}"] = make_config(own, file="paper/glue_roberta", arg="cola,smoke")
    sweep = Sweep("seeds", tuple(Cell(name, config) for name, config in configs.items()))
    results = run_sweep(sweep, tmp_path / "packed", progress=False)
    alone = train(configs["s1"], tmp_path / "alone", "s1", progress=False)
    assert results["s1"].program.K == 2 and configs["s1"].train.model_dropout
    off = configs["s1"].replace({"train.model_dropout": False})
    off = train(off, tmp_path / "alone", "off", progress=False)
    of = lambda card: card.metrics.train.loss  # noqa: E731
    assert of(results["s1"]) == pytest.approx(of(alone), abs=1e-5)
    assert abs(of(off) - of(alone)) > 1e-4


def test_model_that_cannot_write_is_refused(tmp_path):
    config = make_config({"model.name": "tiny-bert", "model.scan_layers": False})
    with pytest.raises(RequestError, match="'tiny-bert' is an encoder; name a causal"):
        train(config, tmp_path, progress=False)
