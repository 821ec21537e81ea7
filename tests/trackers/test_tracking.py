"""Tracked cells: each step once in the tracker's store, however the training was stopped."""

from __future__ import annotations

import json
import random
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.sweeps import run_sweep, stored
from lora_jax.sweeps.prepared import PackBatches
from lora_jax.train import run as run_module
from lora_jax.train import train
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.tracking import TrackedCell, make_links
from tests.sweeps.stored_problem import everything, sweep_of
from tests.trackers.store import Store, expected_rows, summary_of_cell, without_times
from tests.train.test_resume import Crash, at_call, crash, interrupt

# Two that share a program, and one that trains alone.
CELLS = {
    "r1": {"method.rank": 1},
    "r2": {"method.rank": 2},
    "head": {"method.name": "head"},
}


class Lossy(Store):
    """Loses the end of what a process has sent, as one that writes in the background does."""

    def start(self, name, group, settings, run_id):
        if run_id in self.runs and not self.runs[run_id].summaries:
            del self.runs[run_id].rows[-1:]
        return super().start(name, group, settings, run_id)


@pytest.mark.parametrize("kind", [pytest.param(Store, marks=pytest.mark.slow), Lossy])
def test_a_sweep_stopped_again_and_again_has_each_step_once(make_config, tmp_path, kind):
    """Checkpoints fall on steps 4, 8 and 12; logs on 3, 6, 9 and 12."""
    store, sweep = kind(), sweep_of(make_config, {}, CELLS)

    def go(*stop, expect=Crash):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, *stop)
            with pytest.raises(expect):
                run_sweep(sweep, tmp_path, progress=False, trackers=[store])
        if expect is Crash:  # a killed process ends no run
            for run in store.runs.values():
                run.summaries[:] = [one for one in run.summaries if one]

    go(PackBatches, "at", 4, crash)  # before any checkpoint: begins anew
    go(PackBatches, "at", 8, crash)  # goes back from step 7 to 4
    go(PackBatches, "at", 3, interrupt, expect=lj.train.Interrupted)
    go(stored, "write_results", 2, crash)  # one cell has its card
    go(run_module, "write_results", 1, crash)
    run_sweep(sweep, tmp_path, progress=False, trackers=[store])
    assert len(store.runs) == len(CELLS)
    for name in CELLS:
        run, cell = store.named(name), tmp_path / "cells" / name
        steps = [step for step, _ in run.rows]
        assert steps == [3, 4, 6, 8, 9, 12]
        assert without_times(run.rows) == without_times(expected_rows(cell))
        assert run.summaries[-1] == summary_of_cell(cell)
        config = json.loads((cell / "config.json").read_text())
        assert run.group == "test" and run.settings["method.name"] == config["method"]["name"]
        card = json.loads((cell / "card.json").read_text())
        assert run.settings["config_hash"] == card["config_hash"]
        assert run.settings["commit"].partition("+")[0] == card["commit"].partition("+")[0]
    # What is finished, and complete in the tracker, is not sent again.
    before = [list(run.rows) for run in store.runs.values()]
    run_sweep(sweep, tmp_path, progress=False, trackers=[store])
    assert [run.rows for run in store.runs.values()] == before


class Broken(Store):
    """Has an outage: from its third row on nothing comes through."""

    is_up, num_rows = False, 0

    def log(self, step, numbers):
        Broken.num_rows += 1
        if not Broken.is_up and Broken.num_rows > 2:
            raise ConnectionError("the server\nis gone: http://me:secret@host/")
        super().log(step, numbers)


def test_a_tracker_that_fails_is_told_once_and_changes_nothing(make_config, tmp_path, capfd):
    sweep = sweep_of(make_config, {}, {name: CELLS[name] for name in ("r1", "r2")})
    broken, healthy = Broken(), Store()
    tracked, plain = tmp_path / "tracked", tmp_path / "plain"
    run_sweep(sweep, tracked, progress=False, trackers=[broken, healthy])
    told = [line for line in capfd.readouterr().err.splitlines() if "Broken" in line]
    assert len(told) == 1 and "ConnectionError: the server is gone: http://host/; the" in told[0]
    run_sweep(sweep, plain, progress=False)
    assert everything(tracked) == everything(plain)
    for name in ("r1", "r2"):
        assert healthy.named(name).rows == expected_rows(tracked / "cells" / name)
        assert not broken.named(name).summaries
    # The same command again sends what is missing, though nothing trains; so does one with a
    # tracker that is new.
    Broken.is_up, late = True, type("Late", (Store,), {})()
    run_sweep(sweep, tracked, progress=False, trackers=[broken, healthy, late])
    for name in ("r1", "r2"):
        for store in (broken, late):
            assert store.named(name).rows == expected_rows(tracked / "cells" / name)
            assert store.named(name).summaries == healthy.named(name).summaries
    assert len(broken.runs) == len(healthy.runs) == len(late.runs) == 2


def test_a_cell_that_fails_says_so_in_its_run(make_config, tmp_path):
    store = Store()
    with pytest.raises(lj.RequestError, match="nan|inf"):
        train(make_config({"optimizer.lr": 1e30}), tmp_path, progress=False, trackers=[store])
    (run,) = store.runs.values()
    assert run.group == "" and len(run.summaries) == 1
    assert "learning rate 1e+30" in run.summaries[0]["error"]


def test_only_the_first_process_tracks(monkeypatch):
    assert len(make_links([Store()])) == 1
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert make_links([Store()]) == []


def sweep_in_memory(tracker, cells, **options):
    return lj.sweep(
        lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), {"w": jnp.eye(4)},
        [jnp.full((2, 4), 2.0)], cells, progress=False, trackers=[tracker], **options,
    )  # fmt: skip


def test_cells_in_memory_are_tracked_too(capsys):
    store = Store()
    cells = [{"targets": "w", "rank": 1, "lr": lr, "name": f"lr{lr}"} for lr in (1e-3, 1e-2)]
    cells.append({"targets": "w", "rank": 1, "lr": 3e38, "weight_decay": 1e3, "name": "high"})
    found = sweep_in_memory(
        store, cells, num_steps=100, eval_every=40, validation=[jnp.full((2, 4), 3.0)]
    )
    assert len(store.runs) == 3 and len({run.group for run in store.runs.values()}) == 1
    for row in found[:2]:
        run = store.named(row.name)
        assert [step for step, _ in run.rows] == [40, 50, 80, 100]
        numbers = dict(run.rows)
        assert numbers[40]["validation/loss"] == row.validation[0][1]
        assert numbers[100]["best/loss"] == row.best_loss > 0
        # Its mean over the steps since the last log.
        assert numbers[50]["train/loss"] == pytest.approx(row.losses[:50].mean(), rel=1e-5)
        assert run.settings["lr"] == row.settings["lr"] and "accuracy" not in str(numbers)
    assert "error" in store.named("high").summaries[-1]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_library_names_its_extra_before_anything_is_trained(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, name, None)
    workdir = tmp_path / "w"
    for command in (["train"], ["sweep", "--sweep=demo"]):
        arguments = ["--config=reviews_minilm:lora,smoke", f"--workdir={workdir}"]
        assert main([*command, *arguments, f"--track={name}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(
            f"this needs {name}, which is not installed: pip install 'lora_jax[{name}]'"
        )
    assert not workdir.exists()


@pytest.mark.parametrize("text, words", [("wand", "nearest: 'wandb'"), ("mlflow:", "no project")])
def test_a_tracker_that_is_none_is_refused(text, words, tmp_path, capsys):
    workdir = tmp_path / "w"
    arguments = ["--config=reviews_minilm:lora,smoke", f"--workdir={workdir}", f"--track={text}"]
    assert main(["train", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not workdir.exists()


class Simulated:
    """A training of 20 steps without its arithmetic, which dies at random events."""

    NUM_STEPS = 20

    def __init__(self, chance, folder, log_every, eval_every, save_every):
        self.chance, self.folder, self.store = chance, folder, Store()
        self.log_every, self.eval_every, self.save_every = log_every, eval_every, save_every
        self.saved = (0, 0, 0)  # step, evaluated, lines

    def run(self):
        """Processes, one after the other, until one gets to the end."""
        while not self.process():
            for run in self.store.runs.values():  # what it had not written yet
                del run.rows[len(run.rows) - self.chance.randint(0, min(2, len(run.rows))) :]

    def process(self):
        cell, (step, evaluated, lines) = TrackedCell("cell", "", {}, self.folder), self.saved
        try:
            with MetricsWriter(self.folder, num_lines=lines, step=step) as writer:
                cell.start(make_links([self.store]))
                self.train(cell, writer, step, evaluated)
            self.maybe_die()
            cell.finish({"test/loss": 0.5})
        except Crash:
            return False
        return True

    def train(self, cell, writer, step, evaluated):
        while True:
            if step > evaluated and self.is_evaluated(step):
                if self.chance.random() < 0.05:  # a signal in the evaluation: saved without it
                    self.saved = (step, evaluated, writer.num_lines)
                    raise Crash
                self.write(writer, cell, step, "validation")
                evaluated = step
            if step and step % self.save_every == 0:
                self.saved = (step, evaluated, writer.num_lines)
                self.maybe_die()
            if step == self.NUM_STEPS:
                return
            step += 1
            if step % self.log_every == 0:
                self.write(writer, cell, step, "train")
            cell.reached(step)

    def is_evaluated(self, step):
        return step % self.eval_every == 0 or step == self.NUM_STEPS

    def write(self, writer, cell, step, split):
        writer.write(step=step, split=split, loss=1.0 / step)
        self.maybe_die()
        cell.row(step, split, {"loss": 1.0 / step})
        self.maybe_die()

    def maybe_die(self):
        if self.chance.random() < 0.02:
            raise Crash

    def expected(self):
        rows: dict[int, dict[str, float]] = {}
        for step in range(1, self.NUM_STEPS + 1):
            if step % self.log_every == 0:
                rows.setdefault(step, {})["train/loss"] = 1.0 / step
            if self.is_evaluated(step):
                rows.setdefault(step, {})["validation/loss"] = 1.0 / step
        rows[max(rows)]["test/loss"] = 0.5
        return sorted(rows.items())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))
def test_no_step_is_missing_or_doubled_whenever_the_process_dies(
    tmp_path_factory, seed, log_every, eval_every, save_every
):
    folder = tmp_path_factory.mktemp("cell")
    training = Simulated(random.Random(seed), folder, log_every, eval_every, save_every)
    training.run()
    assert training.store.named("cell").rows == training.expected()
