"""Folders of every family: what is read of a config and of tensors, in one file or several."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.core.errors import RequestError
from tests.models.folders import (
    FIXTURES,
    assert_same_params,
    copied,
    edit_config,
    edit_tensors,
    load,
    logits_of,
)

# The fields of a config


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("llama_gqa_tied", {"rope_theta": 500.0}),
        ("llama_gqa_tied", {"rope_theta": 500, "rope_scaling": None}),
        ("llama_rope_linear", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "llama_rope_llama3",
            {
                "rope_theta": 50.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
    ],
)
def test_rotations_are_read_in_the_fields_of_both_transformers(tmp_path, name, older):
    folder = copied(name, tmp_path)
    wanted = load(folder).config
    written = wanted.to_json()["rope_parameters"]
    as_read = json.loads((folder / "config.json").read_text())["rope_parameters"]
    # Numbers of their own types, too: transformers warns of a count that is no integer.
    assert json.dumps(written, sort_keys=True) == json.dumps(as_read, sort_keys=True)
    edit_config(folder, rope_parameters="absent", **older)
    assert load(folder).config == wanted


def test_the_weights_keep_the_dtype_of_their_file_whatever_the_config_calls_it(tmp_path):
    folder = copied("gpt2", tmp_path)
    for names in ({"dtype": "bfloat16"}, {"dtype": "absent", "torch_dtype": "bfloat16"}):
        edit_config(folder, **names)
        assert {x.dtype for x in jax.tree.leaves(load(folder).params)} == {jnp.dtype("float32")}
    half = {k: x.astype(jnp.bfloat16) for k, x in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    assert {x.dtype for x in jax.tree.leaves(load(folder).params)} == {jnp.dtype("bfloat16")}
    wide = load(folder, dtype="float32").params
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


def test_where_a_text_ends_is_what_the_generation_config_says(tmp_path):
    folder = copied("llama", tmp_path)
    assert load(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7], "top_k": 3}')
    assert load(folder).eos_token_ids == (5, 7)
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=None)
    model = load(folder)
    assert (model.eos_token_ids, model.eos_token_id, model.pad_token_id) == ((), None, 0)


# The tensors of a file


def test_a_decoder_saved_without_its_head_is_read_under_its_shorter_names(tmp_path):
    for name, prefix in (("gpt2", "transformer."), ("qwen2", "model.")):
        folder = copied(name, tmp_path)
        wanted = load(folder)
        edit_tensors(folder, lambda t, p=prefix: {k.removeprefix(p): x for k, x in t.items()})
        assert_same_params(load(folder), wanted)


def test_what_old_files_carry_beside_the_weights_is_left_aside(tmp_path):
    beside = {
        "gpt2": {
            "transformer.h.0.attn.bias": np.ones((1, 1, 20, 20), np.uint8),
            "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32),
        },
        "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
        "roberta": {
            "embeddings.position_ids": np.arange(20)[None],
            "lm_head.dense.weight": np.ones((16, 16), np.float32),
        },
    }
    for name, tensors in beside.items():
        folder = copied(name, tmp_path)
        wanted = load(folder)
        edit_tensors(folder, lambda t, more=tensors: t | more)
        assert_same_params(load(folder), wanted)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path):
    folder = copied("gpt2", tmp_path)
    wanted = load(folder)
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].copy()})
    assert_same_params(load(folder), wanted)

    def other(tensors):
        tensors["lm_head.weight"][3, 4] += 1.0

    edit_tensors(folder, other)
    with pytest.raises(RequestError, match="lm_head.weight other than .*wte.*tie_word_embeddings"):
        load(folder)
    # As advised: untied, both are used.
    edit_config(folder, tie_word_embeddings=False)
    assert load(folder).params["head"]["kernel"].shape == (16, 64)


def test_an_untied_model_without_its_head_is_refused_and_one_for_a_task_is_not(tmp_path):
    folder = copied("llama", tmp_path)
    edit_tensors(folder, lambda t: {k: x for k, x in t.items() if k != "lm_head.weight"})
    with pytest.raises(RequestError, match=r"decoder without its head \(lm_head\.weight"):
        load(folder)
    model = load(folder, head="classification", num_labels=3)
    assert model.head_is_new and logits_of(model).shape == (2, 3)


def test_a_head_of_the_family_s_own_is_used_and_counts_its_labels():
    model = load(FIXTURES / "llama_classifier", head="classification")
    stored = load_file(FIXTURES / "llama_classifier" / "model.safetensors")["score.weight"]
    assert (model.num_labels, model.head_is_new) == (3, False)
    np.testing.assert_array_equal(model.params["head"]["kernel"], stored.T)
    with pytest.raises(RequestError, match="3 labels, num_labels is 2"):
        load(FIXTURES / "llama_classifier", head="classification", num_labels=2)
    with pytest.raises(RequestError, match="has no head for a task.*num_labels"):
        load(FIXTURES / "roberta", head="classification")


# Weights in several files


@pytest.fixture
def sharded(tmp_path):
    return copied("llama_sharded", tmp_path)


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


# Stacked, too: two tensors of one parameter may lie in two files.
@pytest.mark.parametrize("scan_layers", [False, True])
def test_several_files_are_one_model(sharded, scan_layers):
    whole = load(FIXTURES / "llama", scan_layers=scan_layers)
    assert_same_params(load(sharded, scan_layers=scan_layers), whole)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("../x.safetensors", "in '../x.safetensors', which is not the name of a file"),
        ("/etc/passwd", "in '/etc/passwd', which is not"),
        ("sub/x.safetensors", "in 'sub/x.safetensors', which is not"),
        ("..", r"in '\.\.', which is not"),
        (7, "in 7, which is not"),
        ("other.safetensors", r"other\.safetensors does not exist"),
        ("config.json", r"config\.json .* not a safetensors file"),
    ],
)
def test_an_index_that_names_what_is_no_file_of_the_folder(sharded, file, match):
    shutil.copy(FIXTURES / "llama" / "model.safetensors", sharded.parent / "x.safetensors")
    edit_index(sharded, lambda where: where.update({"model.norm.weight": file}))
    with pytest.raises(RequestError, match=match):
        load(sharded)


def test_an_index_and_files_that_do_not_agree(sharded):
    where = {}
    edit_index(sharded, where.update)
    name, file = "model.norm.weight", where["model.norm.weight"]
    assert list(where.values()).count(file) > 1
    other = next(f for f in where.values() if f != file)
    edit_index(sharded, lambda m: m.update({name: other}))
    with pytest.raises(RequestError, match=f"places {name} in {other}, which does not hold it"):
        load(sharded)
    edit_index(sharded, lambda m: m.pop(name))
    with pytest.raises(RequestError, match=f"{file} holds {name}, which .* does not place"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(RequestError, match="has no weight_map"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(RequestError, match="not valid JSON"):
        load(sharded)


def test_a_file_cut_short_or_gone_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    content = file.read_bytes()
    for kept in (4, 100, len(content) - 1):
        file.write_bytes(content[:kept])
        with pytest.raises(RequestError, match=rf"{file.name} .*truncated"):
            load(sharded)
    file.unlink()
    with pytest.raises(RequestError, match=f"{file.name} does not exist"):
        load(sharded)


def test_nan_in_one_of_several_files_is_named(sharded):
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file = sharded / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][2, 3] = np.nan
    save_file(tensors, file)
    for scan_layers in (False, True):
        with pytest.raises(RequestError, match=f"NaN or infinity: {name}"):
            load(sharded, scan_layers=scan_layers)
