"""The real libraries, in their local modes: after a sweep was killed and gone on with, each step's
metrics stand once in the library's own store.

`make trackers` runs these in an environment that has all of the libraries. The stores are read by
other means than ours: W&B's by its own inspector, TensorBoard's by TensorBoard, SQLite's by SQL.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lora_jax.cli.main import main
from lora_jax.settings import plain_config
from lora_jax.sweeps import run_sweep
from lora_jax.trackers import make_tracker
from tests.sweeps.stored_problem import everything, sweep_of
from tests.trackers.store import TIMES, expected_rows, summary_of_cell
from tests.train.conftest import ROOT
from tests.train.test_resume import wait_for

# What the libraries think of each other's old names is their affair.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default::DeprecationWarning")]

LIBRARIES = {"wandb": ["wandb"], "trackio": ["trackio"], "mlflow": ["mlflow", "alembic"]}
CELLS = {
    "r1": {"method.rank": 1},
    "r2": {"method.rank": 2},
    "head": {"method.name": "head"},
}
LONG = {"train.num_steps": 60, "train.eval_every_steps": 4, "train.checkpoint_every_steps": 16}


def is_installed(name):
    return all(importlib.util.find_spec(one) for one in LIBRARIES[name])


def needs(name):
    if not is_installed(name):
        pytest.skip(f"{name} is not installed; `make trackers` installs it")


def environment(folder):
    return {
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip


def last_step(cell):
    path = cell / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def killed(make_config, tmp_path_factory):
    """The workdir of a sweep that was killed three times; the stores lie next to it."""
    folder = tmp_path_factory.mktemp("tracked")
    workdir, names = folder / "w", [name for name in LIBRARIES if is_installed(name)]
    sweep = sweep_of(make_config, LONG, CELLS)
    configs = {cell.name: plain_config(cell.config) for cell in sweep.cells}
    (folder / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "tests.trackers.run_tracked", str(folder / "configs.json")]

    def start():
        env = {**os.environ, **environment(folder)}
        return subprocess.Popen([*command, str(workdir), *names], cwd=ROOT, env=env)

    # Between checkpoints: of steps 16 and 32 in the pack, and of 16 in the cell alone.
    for cell, step in (("r1", 20), ("r1", 40), ("head", 24)):
        process = start()
        wait_for(process, lambda: last_step(workdir / "cells" / cell) >= step, timeout_s=500.0)  # noqa: B023
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it came to its end before it was killed"
    assert start().wait() == 0
    return workdir


def rows_of_wandb(folder, cell):
    """`(runs, rows, summary)` of a cell in all of the local files."""
    run_id = json.loads((cell / "tracking.json").read_text())["run_id"]
    rows, runs, summary = [], [], {}
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if not line.startswith('{"num"'):
                continue
            record = json.loads(line)
            if record["type"] == "run":
                runs.append(record["run"])
            if record["type"] == "summary":
                summary |= record["summary"].get("update", {})
            if record["type"] == "history":
                item = record["history"]["item"]
                rows.append((item["_step"], {k: x for k, x in item.items() if k[0] != "_"}))
    assert {run["run_id"] for run in runs} == {run_id}
    assert {run["display_name"] for run in runs} == {cell.name}
    assert {run["run_group"] for run in runs} == {"test"}
    return runs[0]["config"]["update"], rows, summary


def rows_of_trackio(folder, cell):
    run_id = json.loads((cell / "tracking.json").read_text())["run_id"]
    name = f"{cell.name}-{run_id[:8]}"
    with sqlite3.connect(folder / "trackio" / "lora_jax.db") as store:
        found = store.execute(
            "SELECT run_id, step, metrics FROM metrics WHERE run_name = ? ORDER BY id", [name]
        ).fetchall()
        configs = store.execute("SELECT config FROM configs WHERE run_name = ?", [name]).fetchall()
    assert len({run for run, _, _ in found}) == len(configs) == 1
    config = json.loads(configs[0][0])
    assert config["_Group"] == "test"
    return config, [(step, json.loads(metrics)) for _, step, metrics in found], None


def rows_of_mlflow(folder, cell):
    run_id = json.loads((cell / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(folder / "mlflow.db") as store:
        ((run,),) = store.execute("SELECT run_uuid FROM tags WHERE value = ?", [run_id]).fetchall()
        found = store.execute(
            "SELECT step, key, value FROM metrics WHERE run_uuid = ? ORDER BY step", [run]
        ).fetchall()
        params = store.execute("SELECT key, value FROM params WHERE run_uuid = ?", [run]).fetchall()
        tags = dict(store.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [run]))
        name, status = store.execute(
            "SELECT name, status FROM runs WHERE run_uuid = ?", [run]
        ).fetchone()
    assert (name, status, tags["lora_jax.group"]) == (cell.name, "FINISHED", "test")
    assert not [one for one, n in Counter((s, k) for s, k, _ in found).items() if n > 1]
    rows = {}
    for step, key, value in found:
        rows.setdefault(step, {})[key] = value
    return dict(params), sorted(rows.items()), {"stopped": tags["stopped"]}


READERS = {"wandb": rows_of_wandb, "trackio": rows_of_trackio, "mlflow": rows_of_mlflow}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_each_step_stands_once_in_the_librarys_own_store(killed, name, cell):
    needs(name)
    folder = killed / "cells" / cell
    config, rows, summary = READERS[name](killed.parent, folder)
    assert_same(rows, expected_rows(folder))
    card = json.loads((folder / "card.json").read_text())
    assert config["config_hash"] == card["config_hash"]
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", config["commit"])
    assert str(config["optimizer.lr"]) == str(card["config"]["optimizer"]["lr"])
    wanted = summary_of_cell(folder)
    if summary is not None:
        assert {key: summary[key] for key in summary if key in wanted}
        assert summary["stopped"] == wanted["stopped"]
    if name == "wandb":
        assert {key: summary[key] for key in wanted} == wanted


def test_each_step_stands_once_in_tensorboard(killed):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed; `make trackers` installs it",
    )
    for name in CELLS:
        folder = killed / "cells" / name
        board = loader.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
        board.Reload()
        found = {
            tag: [(event.step, event.value) for event in board.Scalars(tag)]
            for tag in board.Tags()["scalars"]
        }
        wanted: dict = {}
        for step, numbers in expected_rows(folder):
            for tag, number in numbers.items():
                wanted.setdefault(tag, []).append((step, number))
        assert found.keys() == wanted.keys()
        for tag, points in wanted.items():
            assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
            if not tag.endswith(TIMES):
                assert found[tag] == [(step, pytest.approx(x, rel=1e-6)) for step, x in points]


def assert_same(rows, wanted):
    assert [step for step, _ in rows] == [step for step, _ in wanted]
    for (step, found), (_, numbers) in zip(rows, wanted, strict=True):
        assert found.keys() == numbers.keys(), step
        for key, number in numbers.items():
            # A step that was trained twice took another time; its numbers are the same bits.
            if not key.endswith(TIMES):
                assert found[key] == number, (step, key)


def test_a_server_that_goes_away_is_told_once_and_the_cards_are_the_same(
    make_config, tmp_path, monkeypatch, capfd
):
    """MLflow's store loses its file's tables in the middle of the training."""
    needs("mlflow")
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    tracker = make_tracker("mlflow")
    sweep = sweep_of(make_config, {}, {name: CELLS[name] for name in ("r1", "r2")})
    real, count = type(tracker).log, 0

    def log(self, step, numbers):
        nonlocal count
        count += 1
        if count == 3:
            with sqlite3.connect(tmp_path / "mlflow.db") as store:
                store.execute("ALTER TABLE metrics RENAME TO elsewhere")
        real(self, step, numbers)

    monkeypatch.setattr(type(tracker), "log", log)
    run_sweep(sweep, tmp_path / "tracked", progress=False, trackers=[tracker])
    told = [line for line in capfd.readouterr().err.splitlines() if "goes on without it" in line]
    assert len(told) == 1 and told[0].startswith("mlflow:lora_jax: ")
    run_sweep(sweep, tmp_path / "plain", progress=False)
    assert everything(tmp_path / "tracked") == everything(tmp_path / "plain")


def test_a_server_that_does_not_answer_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, capsys
):
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    workdir = tmp_path / "w"
    assert main(["train", "--config=reviews_minilm:lora,smoke", f"--workdir={workdir}",
                 "--track=mlflow"]) == 2  # fmt: skip
    said = capsys.readouterr().err
    assert "MLflow at http://127.0.0.1:9 cannot be used" in said and "secret" not in said
    assert not workdir.exists()


def test_nobody_logged_in_is_refused_before_anything_is_trained(tmp_path):
    needs("wandb")
    code = "import sys; from lora_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    workdir = tmp_path / "w"
    env = {**os.environ, "WANDB_MODE": "online", "HOME": str(tmp_path)}
    env.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config=reviews_minilm:lora,smoke",
         f"--workdir={workdir}", "--track=wandb"],
        capture_output=True, text=True, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2
    assert "lora-jax: W&B: " in done.stderr and "WANDB_MODE=offline" in done.stderr
    assert not workdir.exists()


def test_wandb_files_of_any_length_are_read_to_their_end(tmp_path, monkeypatch):
    """Records cross the blocks of 32 KiB that the file is made of."""
    needs("wandb")
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    from lora_jax.trackers.wandb_runs import read_records

    tracker = make_tracker("wandb")
    assert tracker.start("long", "", {"text": "x" * 70_000}, "0" * 16) is None
    for step in range(1, 400):
        tracker.log(step, {f"train/{k}": 1.0 / (step + k) for k in range(step % 7 + 1)})
    tracker.finish({"test/loss": 1.0})
    (path,) = Path(tmp_path).glob("wandb/offline-run-*/run-*.wandb")
    records = list(read_records(path))
    assert path.stat().st_size > 3 * 2**15
    steps = [r.history.step.num for r in records if r.WhichOneof("record_type") == "history"]
    assert steps == list(range(1, 400))
    assert records[-1].WhichOneof("record_type") == "exit"
