"""A GGUF file of a Llama says what the Hugging Face folder said that it was made from."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from lora_jax.io.gguf.reader import read_gguf
from lora_jax.models.gguf.llama import gguf_config, gguf_tensors
from tests.models.gguf_files import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    TOKENS,
    WIDE,
    as_llama_cpp,
    needs_smollm2,
    refused,
    smollm2_path,
    tiny_llama,
    write,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_queries_and_keys_come_back_in_the_order_they_had(tmp_path, kv_heads):
    path, weights = tiny_llama(tmp_path / "a.gguf", kv_heads=kv_heads, untied=True)
    tensors = gguf_tensors(read_gguf(path))
    assert set(tensors) == set(weights) and len(tensors) == len(weights)
    for name, expected in weights.items():
        assert tensors.shape_of(name) == expected.shape
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)


def test_names_and_shapes_cost_no_reading(tmp_path):
    path, weights = tiny_llama(tmp_path / "a.gguf")
    tensors = gguf_tensors(read_gguf(path))
    path.unlink()
    assert all(name in tensors for name in weights) and "odd" not in tensors
    assert {name: tensors.shape_of(name) for name in tensors} == {
        name: weight.shape for name, weight in weights.items()
    }


def test_biases_of_queries_and_keys_follow(tmp_path):
    bias = np.arange(4 * HEAD_DIM, dtype=np.float32)
    extra = {"blk.0.attn_q.bias": (as_llama_cpp(bias, 4), Type.F32)}
    file = read_gguf(tiny_llama(tmp_path / "a.gguf", extra=extra)[0])
    name = "model.layers.0.self_attn.q_proj.bias"
    np.testing.assert_array_equal(gguf_tensors(file)[name], bias)
    assert gguf_config(file)["attention_bias"] and not gguf_config(file)["mlp_bias"]


def test_config_is_what_a_folder_would_say(tmp_path, tiny):
    config = gguf_config(read_gguf(tiny))
    assert config == {
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    other = read_gguf(tiny_llama(tmp_path / "a.gguf", untied=True, **linear)[0])
    assert gguf_config(other)["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}
    assert gguf_config(other)["tie_word_embeddings"] is False


def llama_3_factors(factor, theta):
    """As llama.cpp's converter writes them, one frequency at a time."""
    for i in range(0, HEAD_DIM, 2):
        wave = 2 * np.pi * theta ** (i / HEAD_DIM)
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / factor + smooth)
        yield 1.0 if wave < 8192 / 4.0 else factor if wave > 8192 / 1.0 else between


def test_llama_3_scaling_is_read_off_its_factors(tmp_path):
    factors = np.array(list(llama_3_factors(32.0, 5e5)), np.float32)
    assert len(set(factors)) > 2  # Both ends and something between.
    extra, theta = {"rope_freqs.weight": (factors, Type.F32)}, {"llama.rope.freq_base": 5e5}
    file = read_gguf(tiny_llama(tmp_path / "a.gguf", extra=extra, **theta)[0])
    scaling = gguf_config(file)["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32.0
    assert scaling["original_max_position_embeddings"] == 8192
    assert "rope_freqs.weight" not in gguf_tensors(file)
    other = {"rope_freqs.weight": (factors**2, Type.F32)}
    file = read_gguf(tiny_llama(tmp_path / "b.gguf", extra=other)[0])
    refused("rope_freqs.weight.* stretches the rotary", gguf_config, file)


def test_unknown_tensors_keep_their_name(tmp_path):
    array = (np.ones((2, 32), np.float32), Type.F32)
    extra = dict.fromkeys(["blk.0.attn_qkv.weight", "blk.9.attn_v.weight", "odd", "blk.1.x"], array)
    tensors = gguf_tensors(read_gguf(tiny_llama(tmp_path / "a.gguf", extra=extra)[0]))
    assert {"blk.0.attn_qkv.weight", "odd", "blk.1.x"} <= set(tensors)
    assert "model.layers.9.self_attn.v_proj.weight" in tensors
    path, _ = tiny_llama(tmp_path / "b.gguf", extra={"model.norm.weight": array})
    refused("names a tensor 'model.norm.weight', as Hugging Face", gguf_tensors, read_gguf(path))
    extra = {"blk.2.attn_k.weight": (np.ones((6, 32), np.float32), Type.F32)}
    tensors = gguf_tensors(read_gguf(tiny_llama(tmp_path / "c.gguf", extra=extra)[0]))
    refused(r"blk.2.attn_k.weight' of shape \(6, 32\) is not for 2 heads", dict, tensors)


WRONG = [
    ("llama.block_count", "2"),
    ("llama.block_count", True),
    ("llama.context_length", None),
    ("llama.feed_forward_length", [96, 96]),
    ("llama.attention.head_count", 0),
    ("llama.attention.head_count", 6),
    ("llama.attention.head_count_kv", 3),
    ("llama.attention.layer_norm_rms_epsilon", -1.0),
    ("llama.attention.layer_norm_rms_epsilon", float("nan")),
    ("llama.attention.value_length", 8),
    ("llama.rope.dimension_count", 8),
    ("llama.rope.freq_base", "x"),
    ("llama.rope.scaling.type", "yarn"),
    ("llama.vocab_size", 7),
    ("llama.expert_count", 8),
    ("llama.attention.sliding_window", 4096),
    ("tokenizer.ggml.bos_token_id", 99999),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{k}={v}" for k, v in WRONG])
def test_metadata_that_cannot_be_are_named(tmp_path, key, value):
    path, _ = tiny_llama(tmp_path / "a.gguf", **{key: value})
    lacks = f"lacks the metadata {key}" if value is None else None
    named = "embedding_length" if value == 6 else key
    message = refused(lacks or f"{named} is ", gguf_config, read_gguf(path))
    assert str(path) in message and ";" in message


def test_other_architectures_and_parts_are_named(tmp_path):
    tensors = {"token_embd.weight": (np.ones((2, 32), np.float32), Type.F32)}
    for read in (gguf_config, gguf_tensors):
        path = write(tmp_path / "a.gguf", {}, tensors, architecture="mamba")
        refused("architecture 'mamba'", read, read_gguf(path))
        part, _ = tiny_llama(tmp_path / "b.gguf", **{"split.count": 3})
        refused("one of 3 parts", read, read_gguf(part))


@needs_smollm2
def test_smollm2_says_what_its_folder_says():
    file = read_gguf(smollm2_path())
    config, tensors = gguf_config(file), gguf_tensors(file)
    published = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in published} == published
    layer = {
        "input_layernorm": (576,),
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "post_attention_layernorm": (576,),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
    shapes = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)} | {
        f"model.layers.{i}.{name}.weight": shape for i in range(30) for name, shape in layer.items()
    }
    assert {name: tensors.shape_of(name) for name in tensors} == shapes
    last = tensors["model.layers.29.self_attn.k_proj.weight"]
    assert last.shape == (192, 576) and np.isfinite(last).all() and 0.01 < last.std() < 1.0
