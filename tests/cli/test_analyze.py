"""`lora-jax analyze` on folders that peft wrote and on runs of this project."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.analysis import adapters
from lora_jax.cli.analyze import distinct_names
from lora_jax.cli.main import main
from lora_jax.models import load

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
ADAPTERS, BASES = FIXTURES / "adapters", FIXTURES / "bases"


@pytest.fixture
def no_models(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", refuse)
    monkeypatch.setattr("lora_jax.models.load_model", refuse)


@pytest.fixture
def no_samples(monkeypatch):
    """Nothing is drawn from random pairs, each shape of which is a program to compile: one test
    here does so, and those of the analysis look at what it gives."""
    monkeypatch.setattr(adapters, "_highest", lambda num1, num2, _: np.full((num1, num2), 0.9))


def test_two_folders_of_peft_make_a_page_without_a_model(tmp_path, capsys, no_models, no_samples):
    paths = [str(ADAPTERS / name) for name in ("llama-all-linear", "llama-list")]
    assert main(["analyze", *paths, f"--base={BASES / 'llama'}", f"--out={tmp_path}"]) == 0
    page = (tmp_path / "analysis.html").read_text()
    assert page.count("<svg") == 6  # φ of inputs and outputs, spectra, Table 7, Figure 8 of each
    for text in ("q_proj", "intruders of 10", "random, expected"):
        assert text in page
    out = capsys.readouterr().out
    assert "the page: file://" in out and "10 matrices are changed by one alone" in out


def test_json_holds_every_number(tmp_path, capsys, no_models):
    paths = [str(ADAPTERS / name) for name in ("llama-rslora", "llama-list")]
    args = ["analyze", *paths, f"--out={tmp_path / 'a.html'}", "--json", "--directions=1"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    (pair,) = found["pairs"]
    assert pair["matrices"] and all(len(m["input"]) == 1 for m in pair["matrices"])
    matrix = found["adapters"]["llama-list"][0]
    assert len(matrix["singular_values"]) == matrix["rank"] and "amplification" not in matrix
    assert Path(found["page"]) == tmp_path / "a.html" and Path(found["page"]).is_file()


def test_a_base_with_an_empty_matrix_and_a_fresh_adapter_make_a_page(
    tmp_path, capsys, recwarn, no_samples
):
    base, adapter = tmp_path / "base", tmp_path / "_fresh"
    shutil.copytree(BASES / "llama", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][:] = 0
    save_file(tensors, base / "model.safetensors")
    shutil.copytree(ADAPTERS / "llama-list", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensor *= 0 if "lora_B" in name else 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    args = [str(adapter), str(ADAPTERS / "llama-list"), f"--base={base}", f"--out={tmp_path}"]
    assert main(["analyze", *args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda text: 1 / 0)
    factors = [m["amplification"]["factor"] for m in found["adapters"]["llama-list"]]
    assert None in factors and any(factors)
    assert "_fresh" in (tmp_path / "analysis.html").read_text()
    assert not [w for w in recwarn if "matplotlib" in str(w.filename)]


def test_control_characters_of_a_strangers_file_do_not_reach_the_terminal(tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "llama-list", folder)
    path = folder / "adapter_model.safetensors"
    odd = {n.replace("q_proj", "q_\x1b[2J_proj"): x for n, x in load_file(path).items()}
    save_file(odd, path)
    assert main(["analyze", str(folder), f"--out={tmp_path}"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_jax.cli.analyze._analyse", lambda *args: 1 / 0)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "x.html"):
        assert main(["analyze", str(ADAPTERS / "llama-list"), f"--out={out}"]) == 2
        assert "give a folder" in capsys.readouterr().err


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    paths = [str(ADAPTERS / name) for name in ("llama-list", "bert-cls")]
    assert main(["analyze", *paths, f"--out={tmp_path}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "have no common matrix" in out
    assert "have no common matrix" in (tmp_path / "analysis.html").read_text()


@pytest.mark.parametrize(
    "args, says",
    [
        (["llama-list", "llama-list"], "given twice"),
        (["llama-list", "--directions=2"], "there is one"),
        (["llama-list", "llama-rslora", "--directions=0"], "have 1 to"),
        (["llama-list", "llama-rslora", "--directions=99"], "have 1 to"),
        (["llama-list", "--modules=("], "no regular expression"),
        (["llama-list", "--modules=c_attn"], "no matrix of llama-list"),
        (["llama-list", "--base=BASES/bert"], "has no weight of"),
        (["nothing-here"], "there is no folder"),
        (["llama-list", "--modules=a{99999999999999999}"], "no regular expression"),
        (["~no-such-user/x"], "is no path"),
        (["x" * 300], "is no path"),
    ],
)
def test_a_bad_request_is_one_line_and_writes_nothing(args, says, tmp_path, capsys):
    paths = [str(ADAPTERS / a) if not a.startswith(("-", "~")) else a for a in args]
    paths = [path.replace("BASES", str(BASES)) for path in paths]
    assert main(["analyze", *paths, f"--out={tmp_path / 'page.html'}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_of_this_project_know_their_base(tmp_path, capsys):
    config = "--config=reviews_minilm:lora,smoke"
    args = ["--name=one", f"--workdir={tmp_path}", "--config.method.rank=4"]
    assert main(["train", config, *args]) == 0
    shutil.copytree(tmp_path / "cells" / "one", tmp_path / "cells" / "two")
    cells = [str(tmp_path / "cells" / name) for name in ("one", "two")]
    capsys.readouterr()
    assert main(["analyze", *cells, f"--out={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(m["rank"] == 4 and "amplification" in m for m in found["adapters"]["one"])
    (note,) = found["notes"]  # φ would be high had they learned nothing
    assert "have the same seed, 0" in note
    for matrix in found["pairs"][0]["matrices"]:
        assert matrix["input"][0][0] == pytest.approx(1, abs=1e-5)


def test_names_are_as_short_as_tells_them_apart():
    assert distinct_names(["a/x/adapter", "b/x/adapter"]) == ["a/x/adapter", "b/x/adapter"]
    assert distinct_names(["one/", "two"]) == ["one", "two"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_key_that_matches_no_module_is_warned_of_in_one_line(
    field, tmp_path, capsys, monkeypatch
):
    shutil.copytree(ADAPTERS / "llama-list", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: {"q_porj": 4}}))
    # As a process of its own shows warnings: pytest records them instead.
    show = lambda m: sys.stderr.write(warnings.formatwarning(m, UserWarning, __file__, 1))  # noqa: E731
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: show(message))
    assert main(["analyze", str(tmp_path / "adapter"), f"--out={tmp_path}"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1 and said[0].startswith("lora-jax: warning: ")
    assert f"{field} names 'q_porj" in said[0] and "q_proj" in said[0]
    assert "lora-jax" not in warnings.formatwarning("x", UserWarning, "f", 1)
