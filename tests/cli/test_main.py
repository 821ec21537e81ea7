"""The command line: each bad request is one line that names the value and the way out, code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli.main import COMMANDS, main
from lora_jax.settings import SETTINGS
from lora_jax.settings.config import find_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "--config=reviews_minilm:lora,smoke"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"text": f"{word} film number {n}", "label": word}
        for n in range(20)
        for word in ("good", "bad")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return [CONFIG, "--config.data.source=jsonl", f"--config.data.path={path}"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"lora-jax {command}" in out
    assert "Example" in out
    if command in ("train", "sweep"):
        assert all(f"  {key}" in out for key in SETTINGS)


def test_help_does_not_wait_for_jax():
    """But of commands that list settings, which each method adds, or configs."""
    commands = sorted(COMMANDS.keys() - {"train", "sweep", "init"})
    code = f"""
import contextlib, sys
from lora_jax.cli.main import main
for command in {commands}:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert "jax" not in sys.modules and "numpy" not in sys.modules, command
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_train_evaluate_merge_inspect_report(texts, tmp_path, capsys):
    workdir = str(tmp_path / "run")
    assert main(["train", *texts, f"--workdir={workdir}", "--no-progress", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    for extra in ([], ["--merged"]):
        assert main(["evaluate", workdir, "--json", *extra]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(card["metrics"]["test"]["loss"], abs=1e-5)
    assert main(["merge", workdir, f"--out={tmp_path / 'merged'}"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    told = json.loads((tmp_path / "run/cells/run/adapter/method.json").read_text())["label_names"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert list(config["id2label"].values()) == told
    assert not any(name.startswith("LABEL_") for name in told)
    assert main(["merge", workdir, f"--out={tmp_path / 'merged'}"]) == 2
    capsys.readouterr()
    assert main(["inspect", workdir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == card["counts"]["total"]
    assert main(["report", workdir]) == 0
    assert (tmp_path / "run" / "report.html").exists()


BAD = {
    "unknown command": (["trian"], "'train'"),
    "unknown argument": (["train", CONFIG, "--wrkdir=x", "--workdir=w"], "--wrkdir"),
    "no config": (["train", "--workdir=w"], "--config="),
    "no such config": (["train", "--config=experiments/reviws.py", "--workdir=w"], "reviws.py"),
    "unknown size": (["inspect", CONFIG.replace("smoke", "smok")], "'smoke'"),
    "unknown key": (["inspect", CONFIG, "--config.method.rnak=4"], "'method.rank'"),
    "wrong type": (["inspect", CONFIG, "--config.method.rank=four"], "four"),
    "unmatched rule": (["inspect", CONFIG, "--config.method.targets=.*/qery"], "query/kernel"),
    "rank 0": (["inspect", CONFIG, "--config.method.rank=0"], "rank is 0"),
    "rank above the matrix": (["inspect", CONFIG, "--config.method.rank=33"], "at most 32"),
    "missing folder": (["inspect", CONFIG, "--config.model.name=/no/such"], "/no/such"),
    "decoding without texts": (["evaluate", "RUN", "--num-beams=2"], "--num-beams is for texts"),
    "missing run": (["evaluate", "/no/such/run"], "/no/such/run"),
    "report of nothing": (["report", "/no/such/run"], "/no/such/run"),
    "verify nothing": (["verify", "/no/such/run"], "/no/such/run"),
    "verify a tolerance": (["verify", "x", "--tolerance=-1"], "--tolerance is -1"),
    "cite nothing": (["cite", "/no/such/run"], "/no/such/run"),
    "status of nothing": (["sweep", "--status", "--workdir=w"], "holds no sweep"),
    "sweep without a name": (["sweep", CONFIG, "--workdir=w"], "--sweep is missing"),
    "no memory": (["sweep", CONFIG, "--sweep=demo", "--workdir=w", "--memory-gib=0"], "above 0"),
    "unknown sweep": (["sweep", CONFIG, "--sweep=dmo", "--workdir=w"], "'demo'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_line_and_writes_nothing(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = BAD[name]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_a_sweep_runs_the_others_when_one_cell_fails_and_finished_cells_stay(
    texts, tmp_path, capsys
):
    file = tmp_path / "mine.py"
    source = find_config("reviews_minilm").read_text()
    file.write_text(
        source
        + '\n\ndef sweep_mine(add):\n    add("good", **{"method.rank": 2})\n'
        + '    add("impossible", **{"method.rank": 99})\n'
    )
    args = [f"--config={file}:lora,smoke", *texts[1:], "--sweep=mine", "--no-progress"]
    args = ["sweep", *args, f"--workdir={tmp_path / 'w'}"]
    assert main(args) == 2
    assert "rank 99" in capsys.readouterr().err
    card = tmp_path / "w" / "cells" / "good" / "card.json"
    before = card.stat().st_mtime_ns
    assert main(args) == 2
    assert card.stat().st_mtime_ns == before


def test_sweep_plan_status_verify_and_cite(texts, tmp_path, capsys):
    file = tmp_path / "mine.py"
    source = find_config("reviews_minilm").read_text()
    body = 'for r in (1, 2): add(f"r{r}", **{"method.rank": r})'
    file.write_text(f"{source}\n\ndef sweep_mine(add):\n    {body}\n")
    workdir = tmp_path / "w"
    args = [f"--config={file}:lora,smoke", *texts[1:], "--sweep=mine", f"--workdir={workdir}"]
    assert main(["sweep", *args, "--plan", "--json"]) == 0
    assert "2 in one program" in json.loads(capsys.readouterr().out)[0]
    assert not workdir.exists()
    assert main(["sweep", *args]) == 0
    seen = capsys.readouterr()
    assert "program 1 of 1: 2 in one program" in seen.err and "2 of 2 cells" in seen.out
    assert main(["sweep", "--status", f"--workdir={workdir}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["done"] == 2
    assert main(["sweep", "--status", f"--workdir={workdir}"]) == 0
    assert "2 done" in capsys.readouterr().out
    cell = workdir / "cells" / "r2"
    assert main(["verify", str(cell), "--no-progress"]) == 0
    assert capsys.readouterr().out.count("the same, bit for bit") == 2
    card = json.loads((cell / "card.json").read_text())
    assert main(["cite", str(cell)]) == 0
    bibtex = capsys.readouterr().out
    assert bibtex.startswith(f"@misc{{lora_jax:{card['config_hash'][:12]},")
    assert card["config_hash"] in bibtex and "hu2022lora" in bibtex
    assert main(["cite", str(workdir)]) == 0
    assert "2 runs" in capsys.readouterr().out
    # The kept copy has no weights, and is enough to verify.
    assert main(["report", str(workdir), f"--keep={tmp_path / 'kept'}"]) == 0
    kept = tmp_path / "kept" / "cells" / "r1"
    card = json.loads((kept / "card.json").read_text())
    card["metrics"]["test"]["loss"] += 1e-7
    (kept / "card.json").write_text(json.dumps(card))
    capsys.readouterr()
    assert main(["verify", str(kept), "--no-progress"]) == 1
    assert "DIFFERS: metrics.test" in capsys.readouterr().out
