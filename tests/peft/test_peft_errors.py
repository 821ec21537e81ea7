"""Whatever is wrong with a PEFT folder is one line that names it; nothing half is left behind."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.peft.load import load_adapter, save_adapter

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "peft"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model():
    return lj.load_model(FOLDER / "bases" / "llama", tokenizer=False)


@pytest.fixture(scope="module")
def tied():
    return lj.load_model(FOLDER / "bases" / "llama_tied", tokenizer=False)


@pytest.fixture
def folder(tmp_path):
    return copy("llama-list", tmp_path)


def copy(case, tmp_path):
    return Path(shutil.copytree(FOLDER / "adapters" / case, tmp_path / "adapter"))


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refused(match, folder, model, **options):
    with pytest.raises(lj.RequestError, match=match) as caught:
        load_adapter(folder, model, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"lora_bias": True}, "lora_bias is True, a bias on B"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying is 'yes'"),
        ({"use_tomorrows_idea": True}, "use_tomorrows_idea is True.*does not know"),
        ({"tomorrow_config": {"a": 1}}, "tomorrow_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"r": -4}, "r is -4"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 5}, "rank 5"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"use_dora": True}, "lacks the magnitude"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": []}, "target_modules is"),
        ({"target_modules": "(.|[a-z._0-9])*X"}, "takes more than|do not name"),
        ({"target_modules": ".*" * 30 + "X"}, "takes more than|do not name"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "no regular expression"),
        ({"layers_pattern": "(?P<layer>x)", "layers_to_transform": 1}, "no regular expression"),
        ({"task_type": "TOKEN_CLS", "r": 10**400}, "r is"),
        ({"lora_alpha": 10**400}, "lora_alpha is"),
        ({"target_modules": ["q_proj"]}, "v_proj.*do not name"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks the adapter of.*o_proj"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"rank_pattern": {"q_proj": 2}}, "says rank 2"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"modules_to_save": ["lm_head"]}, "lacks 'lm_head.weight'"),
        ({"bias": "all"}, "lacks 'model.*bias'"),
        ({"layers_to_transform": [0]}, "layers.1.*do not name"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field(folder, model, changes, match):
    edit_config(folder, **changes)
    refused(match, folder, model)


def test_tying_is_refused_where_it_changes_numbers(folder, model, tmp_path):
    edit_config(folder, ensure_weight_tying=True)
    load_adapter(folder, model)
    other = copy("llama-embedding", tmp_path / "other")
    edit_config(other, ensure_weight_tying=True)
    refused("ensure_weight_tying is True", other, model)


def test_fields_that_change_nothing_are_passed_over(folder, model):
    edit_config(folder, note="mine", tomorrows_field=None, use_other=False, megatron_core="x", k=[])
    load_adapter(folder, model)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(QUERY), "lacks the A of 'model.layers.0.self_attn.q_proj'"),
        (lambda t: t.update({QUERY.replace("q_proj", "r_proj"): t[QUERY]}), "does not have"),
        (lambda t: t.update({QUERY.replace("q_proj", "k_proj"): t[QUERY]}), "k_proj.*do not name"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[QUERY]}),
            "made for an embedding",
        ),
        (lambda t: t.update({"lm_head.lora_A": t[QUERY]}), "does not begin with"),
        (lambda t: t.update({QUERY: t[QUERY].T.copy()}), r"A of .* is \(16, 4\)"),
        (lambda t: t.update({QUERY: np.ones((4, 15), "f")}), "inputs, outputs"),
        (lambda t: t.update({QUERY: np.ones((4, 16, 1), "f")}), r"\(4, 16, 1\)"),
        (lambda t: t.update({QUERY: np.ones((4, 16), np.int8)}), "int8"),
        (lambda t: t[QUERY].__setitem__((1, 1), np.nan), "NaN or infinity"),
    ],
)
def test_every_tensor_is_accounted_for(folder, model, edit, match):
    edit_tensors(folder, edit)
    refused(match, folder, model)


def test_keys_that_peft_leaves_beside_the_plain_ones_are_understood(folder, model):
    """Frozen tables (`save_embedding_layers`) and the wrappers of modules saved whole."""
    start = "base_model.model."
    norm = np.full(16, 1.5, "f")
    table = np.asarray(model.params["embed"]["embedding"])
    edit_config(folder, modules_to_save=["model.norm"])

    def add(tensors):
        tensors[f"{start}model.norm.weight"] = norm
        tensors[f"{start}model.norm.modules_to_save.weight"] = norm
        tensors[f"{start}model.norm.original_module.weight"] = norm - 1
        tensors[f"{start}model.embed_tokens.weight"] = table

    edit_tensors(folder, add)
    _, trainable = load_adapter(folder, model)
    assert set(trainable) - set(load_adapter(FOLDER / "adapters" / "llama-list", model)[1]) == {
        "norm/scale"
    }
    # A table that is not the base's was trained or resized: it takes the base's place, as in peft.
    edit_tensors(folder, lambda t: t.update({f"{start}model.embed_tokens.weight": table + 1}))
    _, trainable = load_adapter(folder, model)
    np.testing.assert_array_equal(trainable["embed/embedding"]["value"], table + 1)
    edit_tensors(
        folder, lambda t: t.update({f"{start}model.norm.modules_to_save.weight": norm + 1})
    )
    refused("two different tensors", folder, model)


def test_a_stack_cannot_be_adapted_here_and_trained_whole_there(tmp_path):
    model = lj.load_model(FOLDER / "bases" / "llama", tokenizer=False)
    shared = {"aliases": model.aliases, "axes": model.axes}
    method = lj.LoRA(targets="layers/1/mlp/down/kernel", rank=2, train=r"layers/0/mlp/.*", **shared)
    trainable, _ = method.init(jax.random.key(0), model.params)
    save_adapter(tmp_path / "out", method, trainable, model)
    load_adapter(tmp_path / "out", model)
    stacked = lj.load_model(FOLDER / "bases" / "llama", tokenizer=False, scan_layers=True)
    refused("without scan_layers", tmp_path / "out", stacked)


def test_a_head_of_another_task_is_refused(tmp_path):
    folder = copy("bert-cls", tmp_path)
    model = lj.load_model(FOLDER / "bases" / "bert_cls", head="classification", tokenizer=False)
    load_adapter(folder, model)
    edit_config(folder, task_type="TOKEN_CLS")
    refused("task_type is 'TOKEN_CLS'", folder, model)


def test_one_folder_serves_whatever_head_the_model_was_loaded_with(tied, tmp_path):
    method, trainable = lora(tied, targets="q")
    save_adapter(tmp_path / "out", method, trainable, tied)
    for options in ({"untie": True}, {"head": "classification", "num_labels": 2}):
        other = lj.load_model(FOLDER / "bases" / "llama_tied", tokenizer=False, **options)
        load_adapter(tmp_path / "out", other)


def test_the_wrong_base_is_refused(folder, model, tied, tmp_path):
    gpt2 = lj.load_model(FOLDER / "bases" / "gpt2", tokenizer=False)
    refused("does not have", folder, gpt2)
    method, trainable = load_adapter(folder, model)
    save_adapter(tmp_path / "own", method, trainable, model)
    params = jax.tree.map(lambda x: x + 1, model.params)
    other = lj.load_model(FOLDER / "bases" / "llama", tokenizer=False)
    other.params.update(params)
    refused("trained on other weights", tmp_path / "own", other)
    refused("other weights of 'model.embed_tokens'", FOLDER / "adapters" / "llama-embedding", other)


def test_a_head_apart_from_a_tied_table_needs_untying(folder, tied, tmp_path):
    edit_config(folder, target_modules=["q_proj", "v_proj", "lm_head"])

    def add(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((4, 16), "f")
        tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((48, 4), "f")

    edit_tensors(folder, add)
    refused("untie=True", folder, tied)
    untied = lj.load_model(FOLDER / "bases" / "llama_tied", tokenizer=False, untie=True)
    load_adapter(folder, untied)


def test_files_that_are_missing_or_damaged(folder, model, tmp_path):
    refused("there is no folder", tmp_path / "nothing", model)
    refused("is not the name of a folder", folder, model, adapter_name="../adapter")
    refused("holds no adapter_config.json", tmp_path, model)
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    for kept in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:kept])
        refused("truncated or not a safetensors file", folder, model)
    for size in (10**6, 10**10, 2**63):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        refused("truncated or not a safetensors file", folder, model)
    path.rename(folder / "adapter_model.bin")
    refused("pickle, which is never opened", folder, model)
    (folder / "adapter_config.json").write_text("{")
    refused("not valid JSON", folder, model)


def test_300_mutated_adapters_give_nothing_but_our_own_error(model, tmp_path):
    """Bytes flipped, cut and inserted in both files: read, or refused by a `RequestError`."""
    rng = random.Random(0)
    source, refusals = FOLDER / "adapters" / "llama-patterns", 0
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        name = rng.choice(sorted(files))
        content = bytearray(files[name])
        # Headers and JSON are where structure is: most of the mutations go there.
        limit = len(content) if rng.random() < 0.2 else min(len(content), 3000)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(limit)
            kind = rng.randrange(4)
            if kind == 0:
                content[place] = rng.randrange(256)
            elif kind == 1:
                del content[place : place + rng.randint(1, 40)]
            elif kind == 2:
                content[place:place] = rng.randbytes(rng.randint(1, 8))
            else:
                content[place] = ord(rng.choice('0123456789"{}[]-,:'))
            limit = min(limit, len(content))
        (folder / name).write_bytes(bytes(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                method, trainable = load_adapter(folder, model)
            except lj.RequestError as error:
                refusals += 1
                assert "\n" not in str(error), number
            else:
                method.bind(trainable, model.params)
    assert 100 < refusals < 300


def lora(model, **settings):
    method = lj.LoRA(aliases=model.aliases, axes=model.axes, **{"rank": 2, **settings})
    trainable, _ = method.init(jax.random.key(0), model.params)
    grow = lambda x: x + 0.1 if x.ndim == 2 else x  # noqa: E731
    return method, jax.tree.map(grow, trainable)


def subspace(model):
    method = lj.IntrinsicDimension(dim=3)
    return method, method.init(jax.random.key(0), model.params)[0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: lora(m, targets="embed"), "tied to the head"),
        (lambda m: lora(m, targets="q", rows={"embed": [1]}), "single trained rows"),
        (lambda m: (lj.HeadOnly(train="norm/scale"), {}), "no low-rank adapter"),
        (lambda m: subspace(m), "IntrinsicDimension at 'intrinsic' has no form in PEFT; merge it"),
    ],
)
def test_what_peft_cannot_say_is_refused_and_nothing_is_written(tied, make, match, tmp_path):
    method, trainable = make(tied)
    with pytest.raises(lj.RequestError, match=match):
        save_adapter(tmp_path / "out", method, trainable, tied)
    assert list(tmp_path.iterdir()) == []


def test_one_norm_of_one_layer_is_sayable(tied, tmp_path):
    method, trainable = lora(tied, targets="q", train="layers/0/mlp_norm/scale")
    save_adapter(tmp_path / "out", method, trainable, tied)
    _, again = load_adapter(tmp_path / "out", tied)
    jax.tree.map(np.testing.assert_array_equal, dict(trainable), again)


def test_dora_and_lora_in_one_are_refused(model, tmp_path):
    shared = {"aliases": model.aliases, "axes": model.axes}
    method = lj.Combined(
        [lj.LoRA(targets="q", rank=2, **shared), lj.DoRA(targets="v", rank=2, **shared)]
    )
    trainable, _ = method.init(jax.random.key(0), model.params)
    with pytest.raises(lj.RequestError, match="some of these adapters are DoRA"):
        save_adapter(tmp_path / "out", method, trainable, model)


def test_an_existing_folder_is_left_alone(folder, model):
    method, trainable = load_adapter(folder, model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(lj.RequestError, match="exists already"):
        save_adapter(folder, method, trainable, model)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bfloat16_base_takes_a_float32_adapter_and_keeps_it(folder):
    model = lj.load_model(FOLDER / "bases" / "llama", tokenizer=False, dtype="bfloat16")
    method, trainable = load_adapter(folder, model)
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert all(
        x.dtype == jnp.bfloat16 for x in jax.tree.leaves(method.merge(trainable, model.params))
    )
