"""The families as folders and as functions: what is read, how much of it, and what it means."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Part
from lora_jax.models import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.functional import flatten, functional, unflatten
from lora_jax.models.gpt2 import GPT2Config
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.roberta import RobertaConfig

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "families"
IDS = np.array([[5, 17, 30, 3, 9, 41], [7, 60, 5, 7, 3, 11]])


def copied(name, tmp_path):
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def load(folder, **options):
    return load_model(folder, tokenizer=False, **options)


def logits_of(model, **inputs):
    return np.asarray(jax.jit(model.apply)(model.params, IDS, **inputs))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edited = edit(tensors)
    save_file(tensors if edited is None else edited, folder / "model.safetensors")


def assert_same_params(one, other):
    one, other = flatten(one.params), flatten(other.params)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


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


# The functions


def test_an_untied_head_gives_the_same_logits_and_is_a_parameter_of_its_own():
    for name in ("gpt2", "qwen2"):
        tied, untied = load(FIXTURES / name), load(FIXTURES / name, untie=True)
        assert "head" not in tied.params and untied.params["head"]["kernel"].shape == (16, 64)
        assert not untied.config.tie_word_embeddings
        np.testing.assert_allclose(logits_of(untied), logits_of(tied), rtol=0, atol=1e-5)
    already = load(FIXTURES / "gpt2_untied", untie=True)
    assert_same_params(already, load(FIXTURES / "gpt2_untied"))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa_tied"])
def test_left_padding_changes_nothing_where_positions_count_the_real_tokens(name):
    model = load(FIXTURES / name)
    whole = logits_of(model)
    padded = np.pad(IDS, ((0, 0), (3, 0)), constant_values=1)
    mask = (np.arange(9) >= 3).astype(np.int32)[None].repeat(2, 0)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    logits = jax.jit(model.apply)(model.params, padded, mask, position_ids=positions)
    np.testing.assert_allclose(logits[:, 3:], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("bert", {"scan_layers": True}, "scan_layers is not for Bert models"),
        ("roberta", {"untie": True}, "untie is for decoders"),
        ("llama", {"head": "lm"}, "head is 'lm'"),
    ],
)
def test_options_of_other_families_are_refused(name, arguments, match):
    with pytest.raises(RequestError, match=match):
        load(FIXTURES / name, **arguments)


def test_inputs_that_do_not_fit_are_refused():
    model = load(FIXTURES / "gpt2")
    for inputs, match in (
        ((np.ones((1, 21), int),), "21 tokens is longer than the model's 20 positions"),
        ((np.ones(4, int),), r"int64 \(4,\)|int32 \(4,\)"),
        ((np.ones((1, 4)),), "takes integers"),
        ((np.ones((1, 4), int), np.ones((1, 3), int)), r"attention_mask has shape \(1, 3\)"),
    ):
        with pytest.raises(RequestError, match=match):
            model.apply(model.params, *inputs)
    cache = model.make_cache(batch_size=3, length=8)
    with pytest.raises(RequestError, match="the cache is for 3 rows"):
        model.apply(model.params, IDS, cache=cache)
    with pytest.raises(RequestError, match="30 tokens is longer"):
        model.apply(model.params, IDS, cache=model.make_cache(batch_size=2, length=30))
    with pytest.raises(RequestError, match="is no language model"):
        load(FIXTURES / "bert").make_cache(batch_size=1, length=8)
    with pytest.raises(RequestError, match="loaded without a tokenizer"):
        _ = model.tokenizer


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-llama"])
def test_every_alias_names_parameters_and_all_linear_the_kernels_of_the_layers(name):
    for scan_layers in (False, True) if name in ("tiny-gpt2", "tiny-llama") else (False,):
        model = load_model(name, scan_layers=scan_layers, **_for_a_head(name))
        paths = flatten(model.params)
        for alias, value in model.aliases.items():
            pattern = value.pattern if isinstance(value, Part) else value
            found = [path for path in paths if re.fullmatch(pattern, path)]
            layers = 1 if scan_layers else model.config.num_hidden_layers
            if alias in ("embed", "head"):
                assert found or (alias, name) == ("head", "tiny-gpt2"), alias
            elif alias != "all-linear":
                assert len(found) == layers, (alias, found)
        kernels = [p for p in paths if p.endswith("/kernel") and "layers" in p]
        everything = model.aliases["all-linear"]
        assert [p for p in paths if re.fullmatch(everything, p)] == kernels


def _for_a_head(name):
    is_encoder = name in ("tiny-bert", "tiny-roberta")
    return {"head": "classification", "num_labels": 2} if is_encoder else {}


# Sizes, from shapes alone


def shapes_of(config, **options):
    family = next(f for f in FAMILIES.values() if f.config is type(config))
    return functional(lambda: family.module(config, **options, rngs=nnx.Rngs(0)))


def count(shapes):
    return sum(math.prod(x.shape) for x in shapes.values())


def gpt2_config(num_layers, width, num_heads, **options):
    return GPT2Config(
        vocab_size=50257,
        n_embd=width,
        n_layer=num_layers,
        n_head=num_heads,
        n_positions=1024,
        n_inner=4 * width,
        **options,
    )


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("sizes", "num_params", "num_lora"),
    # The paper's tables (arXiv:2106.09685, Table 3): 354.92M and 774.03M, LoRA 0.35M and 0.77M.
    [((24, 1024, 16), 354_823_168, 393_216), ((36, 1280, 20), 774_030_080, 737_280)],
    ids=["medium", "large"],
)
def test_gpt2_and_its_adapters_have_the_published_sizes(sizes, num_params, num_lora, scan_layers):
    config = gpt2_config(*sizes, scan_layers=scan_layers)
    shapes, apply = shapes_of(config)
    assert count(shapes) == num_params
    params = unflatten(shapes)
    axes = lj.kernel_axes(apply, params, jax.ShapeDtypeStruct((1, 2), "int32"))
    aliases = FAMILIES["gpt2"].aliases(config)
    table = lj.LoRA(targets="q,v", rank=4, aliases=aliases, axes=axes).table(params)
    num_layers, width, _ = sizes
    assert table.num_trainable == num_lora == 2 * num_layers * 2 * width * 4
    assert table.num_params == num_params


def test_roberta_base_has_the_published_size():
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    shapes, _ = shapes_of(config)
    assert count(shapes) == 124_055_040  # 124,645,632 with the pooler that its heads do not use
    shapes, _ = shapes_of(config, num_labels=2)
    assert count(shapes) == 124_647_170
    lora = lj.LoRA(targets="q,v", rank=8, aliases=FAMILIES["roberta"].aliases(config))
    assert lora.table(unflatten(shapes)).num_trainable == 2 * 12 * 2 * 768 * 8


def test_smollm2_135m_has_the_published_size():
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        scan_layers=True,
    )
    assert count(shapes_of(config)[0]) == 134_515_008


# Memory

# Memory of the process's own, sampled: the pages of the mapped file are the system's to take back.
_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import jax
from lora_jax.models import load_model

def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0])

def sample():
    while not done.is_set():
        samples.append(own_memory())
        time.sleep(0.001)

folder, tiny, scan_layers = sys.argv[1], sys.argv[2], sys.argv[3] == "stacked"
load_model(tiny, tokenizer=False, scan_layers=scan_layers)  # what is loaded once for all
samples, done = [own_memory()], threading.Event()
thread = threading.Thread(target=sample)
thread.start()
model = load_model(folder, tokenizer=False, scan_layers=scan_layers)
jax.block_until_ready(model.params)
done.set()
thread.join()
copy = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"grown": max(samples) - samples[0], "copy": copy}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("form", ["apart", "stacked"])
def test_loading_takes_one_copy_and_one_tensor_in_passing(tmp_path, form):
    folder = copied("llama", tmp_path)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    edit_config(folder, **sizes, head_dim=256)
    small = LlamaConfig.from_json(json.loads((folder / "config.json").read_text()), "here")
    shapes, _ = shapes_of(small)
    family = FAMILIES["llama"]
    tensors = {}
    for entry in [*family.entries(small), *family.lm_head(small)]:
        shape = shapes[entry.path].shape
        tensors[entry.tensor] = np.ones(shape[::-1] if entry.is_transposed else shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    # Arrays that are let go go back to the system at once, not to a list of free pieces.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEASURE, str(folder), str(FIXTURES / "llama"), form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    largest = max(x.nbytes for x in tensors.values())
    assert measured["copy"] > 190e6 and largest < 17e6
    # A stack is there whole while a layer's tensor is turned, and small programs fill it; with one
    # more copy of a parameter it would be another 17 MB, or 50.
    most = {"apart": 4e6, "stacked": largest + 16e6}[form]
    assert measured["grown"] < measured["copy"] + largest + most, measured
