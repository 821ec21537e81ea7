"""What a saved folder says of a model beside its weights, and files that claim the absurd."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.models import load_model, save_model

FAMILIES = Path(__file__).resolve().parent.parent / "fixtures" / "families"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def copied(name, tmp_path, **changes):
    folder = Path(shutil.copytree(FAMILIES / name, tmp_path / name))
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))
    return folder


def test_names_of_labels_and_the_kind_of_problem_stay_with_their_head(tmp_path):
    names = {"0": "bad", "1": "so so", "2": "good"}
    folder = copied(
        "bert_classifier", tmp_path, id2label=names, problem_type="multi_label_classification"
    )
    model = load_model(folder, head="classification", tokenizer=False)
    save_model(tmp_path / "again", model, model.params)
    written = config_of(tmp_path / "again")
    assert written["id2label"] == names
    assert written["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize(
    ("num_labels", "kind"), [(1, "regression"), (3, "single_label_classification")]
)
def test_a_new_head_is_written_as_what_it_can_be(num_labels, kind, tmp_path):
    model = load_model("tiny-roberta", head="classification", num_labels=num_labels)
    save_model(tmp_path / "out", model, model.params)
    written = config_of(tmp_path / "out")
    assert written["problem_type"] == kind and len(written["id2label"]) == num_labels
    again = load_model(tmp_path / "out", head="classification")
    assert (again.num_labels, again.head_is_new) == (num_labels, False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_file_that_claims_a_thousand_layers_is_refused_at_once(name, tmp_path):
    folder = copied(name, tmp_path, num_hidden_layers=1000, n_layer=1000)
    start = time.perf_counter()
    with pytest.raises(RequestError, match="does not fit its config.json: missing"):
        load_model(folder, tokenizer=False)
    assert time.perf_counter() - start < 5


def test_where_a_text_ends_is_what_generation_config_says(tmp_path):
    folder = copied("llama", tmp_path)
    for said, found in ((0, (0,)), ([3, 5], (3, 5)), (None, (2,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert load_model(folder, tokenizer=False).eos_token_ids == found


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])  # the latter as wide, but not as far
def test_weights_that_overflow_the_dtype_asked_for_are_refused(tmp_path, stored):
    folder = copied("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: x.astype(stored) for name, x in tensors.items()}
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 1e30)
    save_file(tensors, folder / "model.safetensors")
    load_model(folder, tokenizer=False)
    with pytest.raises(RequestError, match="norm/scale .* does not fit into float16"):
        load_model(folder, tokenizer=False, dtype="float16")


def test_a_merged_decoder_says_how_it_ends(tmp_path):
    model = load_model("tiny-llama", scan_layers=True)
    method = lj.LoRA(targets="q", rank=2, aliases=model.aliases, axes=model.axes)
    trainable, _ = method.init(jax.random.key(0), model.params)
    save_model(tmp_path / "out", model, method.merge(trainable, model.params))
    again = load_model(tmp_path / "out")
    assert again.eos_token_ids == model.eos_token_ids and again.base_hash == model.base_hash
