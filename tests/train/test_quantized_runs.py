"""Runs over a base in four bits, from the config to the merged folder; settings that may lack."""

import json

import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.cli import evaluate, merge
from lora_jax.core import trees
from lora_jax.models import load_model
from lora_jax.train import train


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_quantised_run_is_evaluated_and_merged(dtype, make_config, tmp_path, capsys):
    config = make_config({"method.dropout": 0.0, "model.dtype": dtype, "model.quantize": "nf4"})
    train(config, tmp_path / "work", progress=False)
    cell = str(tmp_path / "work" / "cells" / "run")
    losses = []
    for more in ([], ["--merged"]):
        assert evaluate.run([cell, "--json", *more]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5 if dtype == "float32" else 2e-2)

    out = tmp_path / "merged"
    with pytest.raises(lj.RequestError, match=r"in four bits.*--dtype.*or --requantize"):
        merge.run([cell, f"--out={out}"])
    assert not out.exists()
    assert merge.run([cell, f"--out={out}", "--dtype=bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"]
    tensors = load_file(out / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}
    assert merge.run([cell, f"--out={tmp_path / 'four'}", "--requantize", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drift"] > 0 and max(found["errors"].values()) > 0
    again = load_model(tmp_path / "four", head="classification")
    assert any(isinstance(x, lj.quant.NF4Weight) for x in trees.flatten(again.params).leaves)


def test_settings_that_a_config_may_lack_are_put_in_by_sweeps_and_flags(make_config):
    config = make_config({})
    found = config.replace({"model.quantize": "nf4", "method.rank": 2})
    assert (found.model.quantize, found.method.rank) == ("nf4", 2)
    assert "quantize" not in config.to_dict()["model"]
    with pytest.raises(
        lj.RequestError, match="no setting 'model.quantise'; nearest: 'model.quantize'"
    ):
        config.replace({"model.quantise": "nf4"})
    for key, value, says in [
        ("model.double_quant", "maybe", "must be True or False"),
        ("train.accumulate_steps", "two", "must be a whole number"),
        ("model.quantize", 4, "must be a text"),
    ]:
        with pytest.raises(lj.RequestError, match=says):
            config.replace({key: value})
