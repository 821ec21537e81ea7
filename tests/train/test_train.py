"""Whole trainings on tiny-bert: what they leave, when they stop, what they refuse."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.data import load_splits
from lora_jax.serve.adapters import load_adapter
from lora_jax.train import train
from lora_jax.train.build import build, keys_of, make_model, plan_steps
from lora_jax.train.cell import STOPPED_IMPROVING, Progress, Schedule

CARD_KEYS = {
    "config", "config_hash", "base_hash", "data_hash", "seeds", "versions", "commit", "device",
    "program", "finished", "counts", "seconds", "metrics",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    card = train(make_config({"method.dropout": 0.0}), workdir, "lora-r8", progress=False)
    return workdir / "cells" / "lora-r8", card


def test_card_says_what_ran(finished):
    cell, card = finished
    assert json.loads((cell / "card.json").read_text()) == card.to_json()
    assert card.to_json().keys() == CARD_KEYS
    # tiny-bert: width 32, two layers, query and value, rank 8; a head of 32 x 2 + 2.
    assert card.counts.to_json() == {"adapter": 2 * 2 * 2 * 32 * 8, "head": 66, "total": 2048 + 66}
    assert card.program.ranks == [8]
    assert len(card.program.targets) == 4
    assert card.program.batch_shapes == [[8, 16]]
    assert card.metrics.stopped == "budget of 12 steps ended"
    assert 0 < card.seconds.compile < card.seconds.total and card.seconds.per_step > 0
    adapter_file = cell / "adapter" / "trainable.safetensors"
    assert card.metrics.adapter_bytes == adapter_file.stat().st_size


def test_metrics_hold_what_was_logged_and_evaluated(finished):
    cell, card = finished
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    steps = {split: [row["step"] for row in rows if row["split"] == split] for split in
             ("train", "validation", "test")}  # fmt: skip
    assert steps == {
        "train": [3, 6, 9, 12],
        "validation": [4, 8, 12],
        "test": [card.metrics.validation.best_step],
    }
    validation = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    best = min(validation, key=validation.get)
    assert card.metrics.validation.best_step == best
    assert card.metrics.validation.loss == validation[best]


def test_predictions_are_those_of_the_card(finished):
    cell, card = finished
    with np.load(cell / "test_predictions.npz") as saved:
        assert {name: saved[name].dtype.name for name in saved} == {
            "loss": "float32",
            "correct": "bool",
            "label": "int32",
            "index": "int64",
        }
        test = card.metrics.test
        np.testing.assert_array_equal(saved["index"], np.arange(test.n))
        assert float(np.mean(saved["loss"], dtype=np.float64)) == pytest.approx(test.loss)
        assert float(np.mean(saved["correct"])) == pytest.approx(test.accuracy)


def test_saved_adapter_gives_the_predictions_again(finished, make_config):
    """Loaded into a model built anew, merged, and run without any of the trainer's code."""
    cell, _ = finished
    adapted = load_adapter(cell / "adapter")
    params = adapted.method.merge(adapted.trainable, adapted.frozen)
    splits = load_splits(make_config().data)
    with np.load(cell / "test_predictions.npz") as saved:
        wanted = saved["loss"]
    apply = jax.jit(adapted.model.apply)
    for number, text in enumerate(splits.test.texts):
        ids = np.zeros((1, 16), np.int32)
        tokens = adapted.model.tokenizer.encode(text).ids[:16]
        ids[0, : len(tokens)] = tokens
        mask = (np.arange(16) < len(tokens)).astype(np.int32)[None]
        logits = np.asarray(apply(params, ids, mask), np.float64)[0]
        loss = np.log(np.sum(np.exp(logits))) - logits[splits.test.labels[number]]
        assert loss == pytest.approx(wanted[number], abs=1e-5)


def test_adapter_of_another_base_is_refused(finished, tmp_path):
    cell, _ = finished
    for name in ("trainable.safetensors", "method.json"):
        (tmp_path / name).write_bytes((cell / "adapter" / name).read_bytes())
    description = json.loads((tmp_path / "method.json").read_text())
    description["base_hash"] = "0" * 64
    (tmp_path / "method.json").write_text(json.dumps(description))
    with pytest.raises(RequestError, match="base hash 000000000000, here"):
        load_adapter(tmp_path)


def test_folder_without_adapter_is_named(tmp_path):
    with pytest.raises(RequestError, match="holds no run"):
        load_adapter(tmp_path)


def load_model_and_head(config):
    model = make_model(config.model, keys_of(config.seed)[0])
    return dict(trees.flatten(model.params).items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("full", ".*"),
        pytest.param("bitfit", ".*bias", marks=SLOW),
        pytest.param("head", "", marks=SLOW),
    ],
)
def test_each_method_trains_what_it_names(name, pattern, make_config, tmp_path):
    changes = {"method.name": name, "train.num_steps": 2}
    card = train(make_config(changes), tmp_path, progress=False)
    base = dict(trees.flatten(lj.load_model("tiny-bert").params).items())
    adapter = sum(leaf.size for path, leaf in base.items() if re.fullmatch(pattern, path))
    assert card.counts.to_json() == {"adapter": adapter, "head": 66, "total": adapter + 66}
    trained = load_adapter(tmp_path / "cells" / "run" / "adapter").trainable
    started = load_model_and_head(make_config(changes))
    changed = {
        path for path, entry in trained.items() if not np.array_equal(entry["value"], started[path])
    }
    # Two steps move everything but what gets no gradient at all: words that never occur.
    assert {"head/kernel", "head/bias"} <= changed
    assert len(changed) >= 0.9 * len(trained)


@pytest.mark.slow
def test_bfloat16_model_trains_whole(make_config, tmp_path):
    changes = {"method.name": "full", "model.dtype": "bfloat16", "train.num_steps": 2}
    card = train(make_config(changes), tmp_path, progress=False)
    assert np.isfinite(card.metrics.test.loss)
    trainable = load_adapter(tmp_path / "cells" / "run" / "adapter").trainable
    dtypes = {str(entry["value"].dtype) for entry in trainable.values()}
    assert dtypes == {"bfloat16", "float32"}  # the base, and the head


def test_stops_when_validation_stops_improving(make_config, tmp_path):
    """With a learning rate of 0 nothing ever improves: the first evaluation and two more."""
    changes = {"optimizer.lr": 0.0, "train.patience": 2, "train.num_steps": 100}
    changes |= {"train.eval_every_steps": 2, "train.log_every_steps": 50}
    card = train(make_config(changes), tmp_path, progress=False)
    assert card.metrics.stopped == STOPPED_IMPROVING
    assert card.metrics.steps == 6
    assert card.metrics.validation.best_step == 2


def test_best_weights_are_kept_not_the_last(make_config, tmp_path):
    """At a huge rate validation gets worse; a run that ends at the best step has its weights."""
    changes = {"optimizer.lr": 0.3, "optimizer.schedule": "constant", "optimizer.warmup_ratio": 0.0}
    changes |= {"train.eval_every_steps": 1, "train.num_steps": 6}
    card = train(make_config(changes), tmp_path, "long", progress=False)
    best = card.metrics.validation.best_step
    assert 0 < best < 6
    train(make_config(changes | {"train.num_steps": best}), tmp_path, "short", progress=False)
    long, short = (
        tmp_path / "cells" / name / "adapter" / "trainable.safetensors"
        for name in ("long", "short")
    )
    assert long.read_bytes() == short.read_bytes()


def test_a_loss_of_nothing_stops_nobody_who_has_no_target():
    progress = Progress(step=1)
    progress.evaluate(0.0, 1.0, Schedule(9, eval_every=1, patience=0))
    assert not progress.stopped


def test_a_cell_stops_once_it_has_learned_enough():
    schedule, progress = Schedule(9, eval_every=1, patience=0, target_loss=0.7), Progress()
    for progress.step, loss in enumerate((0.9, 0.71, 0.7), 1):
        assert not progress.stopped
        progress.evaluate(loss, 0.5, schedule)
    assert progress.stopped == "validation loss of 0.7 reached" and progress.best_step == 3


@pytest.mark.parametrize("patience", [0, 2])
def test_progress_of_evaluations(patience):
    schedule = Schedule(num_steps=5, eval_every=1, patience=patience)
    progress, history = Progress(), []
    for step, loss in enumerate([0.9, 0.7, 0.8, 0.7, 0.6], 1):
        progress = Progress.from_json(json.loads(json.dumps(progress.to_json() | {"step": step})))
        progress.evaluate(loss, 0.5, schedule)
        history.append((progress.best_step, progress.evaluations_since_best, progress.stopped))
        if progress.stopped:
            break
    # An equal loss is no better one.
    assert history[:4] == [
        (1, 0, ""),
        (2, 0, ""),
        (2, 1, ""),
        (2, 2, STOPPED_IMPROVING if patience else ""),
    ]
    if not patience:
        assert history[4] == (5, 0, "budget of 5 steps ended")


def test_progress_of_a_checkpoint_of_an_earlier_version_goes_on():
    progress = Progress(
        step=7, seconds={"train": 2.0}, logged_seconds=1.5, window=((7, 1, 1, 1, 1),)
    )
    earlier = json.loads(json.dumps(progress.to_json()))
    del earlier["logged_seconds"], earlier["meshes"], earlier["numerics_changes"]
    found = Progress.from_json(earlier, changes=("jax was 1, then 2",))
    assert (found.step, found.window, found.meshes) == (7, progress.window, ())
    assert found.logged_seconds == 2.0  # rates count from here on
    assert found.numerics_changes == ("jax was 1, then 2",)


def test_loss_that_is_not_finite_stops_the_run(make_config, tmp_path):
    changes = {"optimizer.lr": 1e38, "optimizer.schedule": "constant", "optimizer.clip_norm": 0.0}
    changes |= {"optimizer.warmup_ratio": 0.0, "train.log_every_steps": 1}
    with pytest.raises(RequestError) as caught:
        train(make_config(changes), tmp_path, progress=False)
    message = str(caught.value)
    assert "learning rate 1e+38" in message and "Lower optimizer.lr" in message
    assert "\n" not in message
    assert not (tmp_path / "cells" / "run" / "card.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method.rank": 0}, "rank"),
        ({"method.rank": 1000}, "full rank 32"),
        ({"method.targets": "encoder/layers/0/atention/.*"}, "nearest"),
        ({"method.name": "lroa"}, "nearest: 'lora'"),
        ({"model.num_labels": 3}, "the data have 2 labels"),
        ({"model.name": "/nowhere/model"}, "/nowhere/model"),
        ({"data.path": "/nowhere/texts.jsonl"}, "/nowhere/texts.jsonl"),
        ({"train.num_steps": -1}, "train.num_steps=-1"),
        ({"train.label_smoothing": 1.0}, "train.label_smoothing=1.0"),
        ({"optimizer.lr": -1.0}, "optimizer.lr=-1.0"),
    ],
)
def test_bad_request_is_one_line_and_leaves_nothing(changes, words, make_config, tmp_path):
    with pytest.raises(RequestError) as caught:
        train(make_config(changes), tmp_path / "runs", progress=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_name_that_is_no_folder_name_is_refused(name, make_config, tmp_path):
    with pytest.raises(RequestError, match="name"):
        train(make_config(), tmp_path / "runs", name, progress=False)


def test_epochs_become_steps(make_config):
    changes = {"train.num_steps": 0, "train.num_epochs": 1.5, "train.eval_every_steps": 0}
    plan = plan_steps(make_config(changes).train, 10)
    assert (plan.num_steps, plan.eval_every, plan.checkpoint_every) == (15, 2, 2)


def test_seed_decides_head_adapters_and_order(make_config):
    def beginning(seed):
        setup, state = build(make_config({"seed": seed}))
        batch = next(setup.batches)
        leaves = [*jax.tree.leaves(state.trainable), batch["input_ids"]]
        return [np.asarray(leaf) for leaf in leaves if np.any(leaf)]

    first, again, other = beginning(0), beginning(0), beginning(1)
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(first, other, strict=True))
    assert jnp.issubdtype(first[-1].dtype, jnp.integer)
