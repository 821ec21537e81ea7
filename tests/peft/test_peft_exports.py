"""Exports drop nothing in silence, and files of other programs are named for what they are."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.core.weights import GainWeight
from lora_jax.io.safetensors import read_tensors, write_tensors
from lora_jax.models.save import label_fields, save_model
from lora_jax.peft.factors import read_factors
from lora_jax.peft.load import load_adapter, save_adapter

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "peft"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model():
    return lj.load_model(FIXTURES / "bases" / "llama", tokenizer=False)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FIXTURES / "adapters" / "llama-list", tmp_path / "adapter"))


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def named(tensors, name="default"):
    return {key.replace(".weight", f".{name}.weight"): x for key, x in tensors.items()}


class Gained(lj.LoRA):
    """A variant with a value of its own."""

    def weight(self, low_rank, parts, site):
        gain = 2.0 * jnp.ones(site.part_shape("so"))
        return GainWeight(kernel=low_rank, gain=gain, roles=site.roles, path=site.path)


class Doubled(lj.DoRA):
    """A DoRA that binds something else than PEFT's."""

    def weight(self, low_rank, parts, site):
        return super().weight(low_rank, {**parts, "magnitude": 2 * parts["magnitude"]}, site)


class Empty(lj.LoRA):
    """A variant without factors."""

    def factors(self, parts, site):
        a, b = super().factors(parts, site)
        return a[..., :0], b[..., :0, :]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", [Gained, Doubled, Empty])
def test_what_a_file_of_factors_cannot_say_is_refused_with_the_class(kind, plain, model, tmp_path):
    method = kind(targets="q", rank=2, aliases=model.aliases)
    trainable, _ = method.init(jax.random.key(0), model.params)
    with pytest.raises(lj.RequestError, match=f"{kind.__name__}.*merge it") as caught:
        save_adapter(tmp_path / "out", method, trainable, model, plain=plain)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plain", [False, True])
def test_a_method_without_factors_is_one_line(plain, model, tmp_path):
    method = lj.FullFineTuning(train=".*/q/kernel")
    trainable, _ = method.init(jax.random.key(0), model.params)
    with pytest.raises(lj.RequestError, match="no low-rank adapter"):
        save_adapter(tmp_path / "out", method, trainable, model, plain=plain)


def test_a_raw_state_dict_is_the_adapter_it_holds(folder, model):
    wanted = load_adapter(folder, model)[1]
    matrices = read_factors(folder).factors
    rewrite(folder, named)
    found = load_adapter(folder, model)[1]
    assert found.keys() == wanted.keys()
    for path, entry in wanted.items():
        for part, array in entry.items():
            np.testing.assert_array_equal(found[path][part], array)
    assert read_factors(folder).factors.keys() == matrices.keys()


def test_a_raw_state_dict_of_an_embedding_is_read_as_a_table(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "adapters" / "llama-embedding", tmp_path / "adapter"))
    tables = read_factors(folder).tables
    rewrite(folder, lambda tensors: {
        f"{key}.default" if "lora_embedding" in key else key: x for key, x in tensors.items()
    })  # fmt: skip
    assert read_factors(folder).tables == tables != frozenset()


def test_a_raw_state_dict_of_two_adapters_is_refused(folder, model):
    rewrite(folder, lambda tensors: named(tensors, "first") | named(tensors, "second"))
    for read in (lambda: load_adapter(folder, model), lambda: read_factors(folder)):
        with pytest.raises(lj.RequestError, match="first, second.*selected_adapters"):
            read()


def test_kohyas_alpha_and_mlx_lms_folder_are_named(folder, model, tmp_path, capsys):
    alpha = {f"{QUERY}.alpha": np.full((), 4, np.float32)}
    rewrite(folder, lambda tensors: tensors | alpha)
    with pytest.raises(lj.RequestError, match=r"q_proj.alpha'.*kohya.*lora_alpha"):
        load_adapter(folder, model)
    (tmp_path / "mlx").mkdir()
    text = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "model": "x"})
    (tmp_path / "mlx" / "adapter_config.json").write_text(text)
    for command in ("convert", "merge", "analyze"):
        assert main([command, str(tmp_path / "mlx"), f"--out={tmp_path / 'out'}"]) == 2
        assert "mlx-lm's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shapes_of_another_vocabulary_are_in_the_files_orientation(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "adapters" / "llama-save-head", tmp_path / "adapter"))
    key = "base_model.model.lm_head.weight"
    rows, width = load_file(folder / "adapter_model.safetensors")[key].shape
    rewrite(folder, lambda tensors: tensors | {key: np.ones((rows + 3, width), np.float32)})
    model = lj.load_model(FIXTURES / "bases" / "llama", tokenizer=False)
    says = rf"\({rows + 3}, {width}\), this model has \({rows}, {width}\)"
    with pytest.raises(lj.RequestError, match=says):
        load_adapter(folder, model)


def test_a_number_that_float32_cannot_hold_is_refused_after_the_cast(folder, model, tmp_path):
    method, trainable = load_adapter(folder, model)
    large = jax.tree.map(lambda x: x + 1e6, trainable)
    with pytest.raises(lj.RequestError, match="q_proj' holds numbers that float16 cannot"):
        save_adapter(tmp_path / "out", method, large, model, dtype="float16")
    assert not (tmp_path / "out").exists()
    key = f"{QUERY}.lora_A.weight"
    rewrite(folder, lambda tensors: tensors | {key: np.full(tensors[key].shape, 1e300)})
    with pytest.raises(lj.RequestError, match="q_proj'.*float32 cannot.*1e\\+300"):
        load_adapter(folder, model)


def test_a_base_that_is_not_here_names_the_config_and_the_flag(folder, tmp_path, capsys):
    configure(folder, base_model_name_or_path="/no/such/base")
    assert main(["merge", str(folder), f"--out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err
    assert "adapter_config.json names the base model '/no/such/base'" in line
    assert "--model=" in line


def test_a_saved_head_on_a_tied_base_points_to_untie(tmp_path, capsys):
    source, base = FIXTURES / "adapters" / "llama-save-head", FIXTURES / "bases" / "llama_tied"
    arguments = ["merge", str(source), f"--model={base}", f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert "--untie" in capsys.readouterr().err
    assert main([*arguments, "--untie"]) == 0


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_key_that_matches_no_module_is_said(field, folder, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(folder, model)
    configure(folder, **{field: {"q_porj": 4}})
    with pytest.warns(UserWarning, match=f"{field} names 'q_porj'.*q_proj"):
        load_adapter(folder, model)


def test_the_same_adapter_is_the_same_bytes(folder, model, tmp_path):
    method, trainable = load_adapter(folder, model)
    for number in range(4):
        save_adapter(tmp_path / str(number), method, trainable, model)
    files = {(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(4)}
    assert len(files) == 1
    many = {f"key {n}": "é\n" for n in range(9)}
    arrays = {"a": np.arange(3, dtype=np.int8), "b": np.ones((2, 2), np.float32)}
    for number in range(4):
        write_tensors(tmp_path / f"{number}.safetensors", arrays, metadata=many)
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in range(4)}) == 1
    for name, array in read_tensors(tmp_path / "0.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])


def test_a_merge_says_what_16_bits_lose_and_writes_no_infinity(folder, tmp_path, capsys):
    base, out = FIXTURES / "bases" / "llama", tmp_path / "out"
    arguments = ["merge", str(folder), f"--model={base}", f"--out={out}", "--dtype=float16"]
    configure(folder, lora_alpha=1e9)
    assert main(arguments) == 2
    assert "attention/q/kernel' are NaN or infinite" in capsys.readouterr().err
    assert not out.exists()
    configure(folder, lora_alpha=1e-3)
    assert main([*arguments, "--json"]) == 0
    rounding = json.loads(capsys.readouterr().out)["rounding"]
    assert all(one["lost"] > 0 for one in rounding.values())
    assert any(0 < one["unchanged"] < 1 for one in rounding.values())


def test_names_of_classes_go_with_the_adapter_and_come_back_in_the_merge(tmp_path, capsys):
    model = lj.load_model("tiny-bert", head="classification", num_labels=3)
    save_model(tmp_path / "base", model, model.params)
    method = lj.LoRA(targets="q", rank=2, aliases=model.aliases, train=model.head_pattern)
    trainable, _ = method.init(jax.random.key(0), model.params)
    own = dataclasses.replace(model, labels=label_fields(["bad", "good", "mixed"]))
    save_adapter(tmp_path / "adapter", method, trainable, own)
    base = f"--model={tmp_path / 'base'}"
    for command, source in (("convert", "adapter"), ("merge", "converted")):
        out = tmp_path / {"convert": "converted", "merge": "merged"}[command]
        assert main([command, str(tmp_path / source), base, f"--out={out}"]) == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "mixed"}
    assert config["label2id"] == {"bad": 0, "good": 1, "mixed": 2}
    assert "bad, good, mixed" in capsys.readouterr().out
