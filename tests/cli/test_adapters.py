"""`convert`, `merge` and `inspect --shapes`: adapters in PEFT's format from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.io.safetensors import read_tensors, write_tensors
from lora_jax.peft.load import load_adapter, save_adapter

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "peft"


def base_of(case):
    config = json.loads((FIXTURES / "adapters" / case / "adapter_config.json").read_text())
    return str(FIXTURES / "bases" / config["base_model_name_or_path"])


def load(folder, base):
    model = lj.load_model(base, tokenizer=False)
    return model, *load_adapter(folder, model)


def delta_of(folder, base):
    model, method, trainable = load(folder, base)
    merged = method.merge(trainable, model.params)
    return merged["layers"]["1"]["mlp"]["down"]["kernel"], model


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_folder_that_is_there_is_told_before_anything_is_loaded(command, tmp_path, capsys):
    assert main([command, "/no/such/adapter", f"--out={tmp_path}"]) == 2
    assert f"{tmp_path} exists already" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["llama-patterns", "llama-rslora"])
def test_plain_files_say_the_same_with_alpha_equal_to_r(case, tmp_path, capsys):
    source, base = str(FIXTURES / "adapters" / case), base_of(case)
    out = tmp_path / "plain"
    assert main(["convert", source, f"--model={base}", f"--out={out}", "--plain"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    shapes = {a.shape[0] for n, a in read_tensors(out / "adapter_model.safetensors").items()
              if "lora_A" in n}  # fmt: skip
    assert shapes == {config["r"]}
    theirs, model = delta_of(source, base)
    plain, _ = delta_of(out, base)
    np.testing.assert_allclose(plain, theirs, rtol=0, atol=1e-6)
    assert np.abs(theirs - model.params["layers"]["1"]["mlp"]["down"]["kernel"]).max() > 0.01
    assert "adapter is in" in capsys.readouterr().out


def test_merging_a_peft_adapter_writes_a_model_folder(tmp_path, capsys):
    source, base = FIXTURES / "adapters" / "llama-bias-all", base_of("llama-bias-all")
    out = tmp_path / "merged"
    assert main(["merge", str(source), f"--model={base}", f"--out={out}", "--json"]) == 0
    model, method, trainable = load(source, base)
    merged = method.merge(trainable, model.params)
    again = lj.load_model(out, tokenizer=False)
    np.testing.assert_array_equal(
        again.params["layers"]["0"]["attention"]["q"]["kernel"],
        merged["layers"]["0"]["attention"]["q"]["kernel"],
    )
    assert json.loads(capsys.readouterr().out)["folder"] == str(out)


def test_a_head_on_a_pooling_goes_beside_and_comes_back(tmp_path):
    import jax

    model = lj.load_model("tiny-bert", head="classification", num_labels=2)
    method = lj.LoRA(
        targets="q", rank=2, aliases=model.aliases, axes=model.axes, train=model.head_pattern
    )
    trainable, _ = method.init(jax.random.key(3), model.params)
    save_adapter(tmp_path / "out", method, trainable, model)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"}
    _, again = load_adapter(tmp_path / "out", model)
    jax.tree.map(np.testing.assert_array_equal, dict(trainable), again)
    with pytest.raises(lj.RequestError, match="head='classification'"):
        load_adapter(tmp_path / "out", lj.load_model("tiny-bert"))


def test_names_of_a_class_with_another_head_are_not_lost_silently(tmp_path, capsys):
    """As of BertForMaskedLM, whose modules begin with "bert.", read here as the bare encoder."""
    folder = Path(shutil.copytree(FIXTURES / "adapters" / "bert-cls", tmp_path / "mlm"))
    path = folder / "adapter_config.json"
    changes = {"task_type": None, "modules_to_save": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    tensors = read_tensors(folder / "adapter_model.safetensors")
    kept = {name: x for name, x in tensors.items() if "classifier" not in name}
    write_tensors(folder / "adapter_model.safetensors", kept)
    base = str(FIXTURES / "bases" / "bert")
    load_adapter(folder, lj.load_model(base, tokenizer=False))
    out = tmp_path / "out"
    assert main(["convert", str(folder), f"--model={base}", f"--out={out}"]) == 2
    assert "begin with 'bert.'" in capsys.readouterr().err and not out.exists()


def test_counts_come_from_shapes_alone(capsys):
    assert main(["inspect", "--shapes=gpt2-medium", "--targets=q,v", "--rank=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainable"] == 393_216 and found["params"] == 354_823_168


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "--shapes=gpt5"], "no shapes of 'gpt5' are known"),
        (["convert", "nowhere", "--out=x"], "there is no folder nowhere"),
        (["merge", str(FIXTURES / "adapters" / "llama-list"), "--out=x"], "llama"),
    ],
)
def test_a_bad_request_is_one_line_and_code_2(argv, words, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
