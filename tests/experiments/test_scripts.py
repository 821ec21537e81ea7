"""Every module of experiments/ imports; what the Makefile calls runs, at the smallest size."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import pytest

from experiments import attachment
from experiments.bench import (
    analyze,
    chunked_loss,
    decoding,
    hand_written,
    packed,
    plans,
    torch_pair,
)
from lora_jax.models import load_model, save_model

ROOT = Path(__file__).resolve().parents[2]
# The other tools' columns run in an environment of their own.
PEERS = {f"experiments.peers.{name}" for name in ("of_nnx", "of_quax", "of_qwix")}
NEEDS = {
    "experiments.bench.torch_worker": ("torch", "transformers", "peft"),
    "experiments.zoo.models": ("diffrax", "optimistix"),
}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").rglob("*.py")
    if path.name != "__init__.py" and "results" not in path.parts
)
SIZES = {
    hand_written: "--layers=1 --width=32 --batch=2 --tokens=4 --steps=2",
    packed: "--cells=1 --batch=2 --tokens=4 --layers=1 --width=32 --steps=1 --times=1 --larger=2",
    decoding: "--model=tiny-llama --prompt=4 --new=2 --batches=1 --times=2",
    analyze: "--rounds=1 --small=1x16x2 --large=1x24x2 --many=2",
    chunked_loss: "--tokens=16 --width=8 --vocabulary=32 --dtype=float32 --chunks=16,4",
}
# What `torch_worker.py` says on its standard output, without torch.
WORKER = """\
#!{python}
import json, sys
print(json.dumps({{"torch": "none"}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"seconds": 0.5}}), flush=True)
"""


@pytest.mark.parametrize("name", [name for name in MODULES if name not in PEERS])
def test_a_module_imports(name):
    for needed in NEEDS.get(name, ()):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"no {needed} here: {name} runs in an environment of its own")
    importlib.import_module(name)


def test_every_script_of_the_makefile_is_run_here():
    called = re.findall(r"-m (experiments\.[\w.]+)", (ROOT / "Makefile").read_text())
    tried = {module.__name__ for module in (*SIZES, torch_pair, plans, attachment)}
    tried.add("experiments.zoo")  # its judge: test_zoo.py
    assert called and set(called) <= tried


@pytest.mark.parametrize("module", SIZES, ids=lambda module: module.__name__.split(".")[-1])
def test_a_benchmark_runs_and_keeps_its_record(module, tmp_path):
    module.main([*SIZES[module].split(), f"--out={tmp_path}"])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    kept = json.loads((ROOT / "experiments/results/bench" / path.name).read_text(encoding="utf-8"))
    assert set(kept) - {"malloc"} <= set(record)


def test_the_pair_with_torch_runs_its_side_here(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pair, "ARMS", ("lora-qv", "full"))  # each is a compilation
    python = tmp_path / "python"
    python.write_text(WORKER.format(python=sys.executable))
    python.chmod(0o755)
    tiny = load_model("tiny-bert")
    save_model(tmp_path / "tiny", tiny, tiny.params)
    sizes = f"--model={tmp_path / 'tiny'} --rounds=2 --batch=2 --tokens=4".split()
    torch_pair.main([f"--torch={python}", *sizes, f"--out={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out/torch_pair.json").read_text(encoding="utf-8"))
    assert record["median_seconds"]["torch full"] == 0.5
    assert 0 < record["here_over_torch"]["lora-qv"]["ratio"] < 100


def test_the_plans_table_is_made_from_the_record(tmp_path, monkeypatch):
    """Nothing is planned that this commit has planned; the compiler for TPUs is not needed."""
    folder = ROOT / "experiments/results/bench"
    found = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    ordered = {command: found[command] for command in plans.PLANS}  # JSON sorts its keys
    assert plans.table(ordered) == (folder / "plans.md").read_text(encoding="utf-8")
    monkeypatch.setattr(plans, "version", lambda name: "none")
    plans.main(["--only=no such plan", f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_our_column_of_the_attachment_runs(capsys, monkeypatch):
    for name in attachment.ENVIRONMENT:  # it sets them for the processes of its peers
        monkeypatch.setenv(name, attachment.ENVIRONMENT[name])
    before = jax.config.jax_enable_x64
    try:
        assert attachment.main(["--only=tied_embedding"]) == 0
    finally:
        jax.config.update("jax_enable_x64", before)
    assert "tied_embedding" in capsys.readouterr().out
