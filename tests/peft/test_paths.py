"""`~` is the home folder wherever a path is given in Python."""

from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.io.paths import at_home
from lora_jax.io.run_adapter import load_trainable, save_trainable
from lora_jax.models import save_model
from lora_jax.peft import load as peft
from lora_jax.report.html import page_path
from lora_jax.report.runs import read_runs
from lora_jax.serve.adapters import load_adapter
from lora_jax.sweeps.status import sweep_status
from lora_jax.train import train


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "~").exists()


def test_files_are_written_and_read_at_home(home):
    model = lj.load_model("tiny-bert", head="classification", num_labels=2)
    method = lj.LoRA(targets="q", rank=2, aliases=model.aliases, axes=model.axes, train="head/.*")
    trainable, frozen = method.init(jax.random.key(0), model.params)
    save_model("~/model", model, method.merge(trainable, frozen))
    assert (home / "model" / "config.json").is_file()
    lj.load_model("~/model", head="classification", num_labels=2)
    peft.save_adapter("~/adapter", method, trainable, model)
    assert (home / "adapter" / "adapter_config.json").is_file()
    assert peft.load_adapter("~/adapter", model)[1].keys() == trainable.keys()
    save_trainable("~/own", {"w": {"a": np.ones(2)}}, {"x": 1})
    assert load_trainable("~/own")[1] == {"x": 1} and (home / "own").is_dir()
    assert page_path("~/page.html") == home / "page.html"


def test_workdirs_are_at_home(home):
    config = {
        "model": {"name": "tiny-bert", "num_labels": 2},
        "data": {"source": "csv", "path": "~/none.csv"},
        "method": {"name": "lora", "targets": "q"},
        "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 1},
    }
    with pytest.raises(lj.RequestError, match="none.csv"):
        train(config, "~/runs", progress=False)
    for read in (read_runs, sweep_status, load_adapter):
        with pytest.raises(lj.RequestError, match=str(home / "missing")):
            read("~/missing")


def test_only_paths_are_taken_for_windows_paths(tmp_path):
    with pytest.raises(lj.RequestError, match="is a Windows path"):
        at_home("C:\\runs\\first")
    with pytest.raises(lj.RequestError, match="is a Windows path"):
        page_path("C:\\page.html")
    assert at_home("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
