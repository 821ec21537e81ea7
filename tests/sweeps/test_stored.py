"""Packs on disk: what each cell leaves is what it leaves alone, however the pack was stopped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.data import EvalBatches
from lora_jax.io.run_adapter import load_trainable
from lora_jax.settings import plain_config
from lora_jax.sweeps import run_sweep, stored
from lora_jax.sweeps import workdir as runner
from lora_jax.sweeps.prepared import PackBatches
from lora_jax.sweeps.verify import verify
from lora_jax.train import Interrupted, train
from lora_jax.train.evaluate_run import evaluate_cell
from tests.sweeps.stored_problem import CELLS, everything, rows_of, sweep_of
from tests.train.conftest import ROOT
from tests.train.test_resume import Crash, at_call, crash, interrupt, terminate, wait_for

DECAY = {"optimizer.weight_decay": 0.01}


def run(sweep, workdir, **options):
    return run_sweep(sweep, workdir, progress=False, **options)


@pytest.fixture(scope="module")
def packed(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("packed")
    results = run(sweep_of(make_config, DECAY), workdir)
    assert not [r for r in results.values() if isinstance(r, RequestError)]
    return workdir


# Two of the four differ most: in targets and decay, in rank and dropout.
@pytest.mark.parametrize(
    "name",
    [n if n in ("all-r2", "up-r8") else pytest.param(n, marks=pytest.mark.slow) for n in CELLS],
)
def test_a_cell_of_a_pack_leaves_what_it_leaves_alone(make_config, packed, tmp_path, name):
    train(make_config({**DECAY, **CELLS[name]}), tmp_path, name, progress=False)
    here, alone = packed / "cells" / name, tmp_path / "cells" / name
    (ours, _), (theirs, _) = (load_trainable(cell / "adapter") for cell in (here, alone))
    assert ours.keys() == theirs.keys()
    for path, entry in ours.items():
        for part, array in entry.items():
            # Adam divides by the root of a mean square: rounding moves a weight by more than its
            # own last bit, but far less than a step of 3e-3.
            assert np.max(np.abs(array - theirs[path][part])) < 1e-5, (path, part)
    rows = zip(rows_of(here), rows_of(alone), strict=True)
    for row, other in rows:
        assert row.keys() == other.keys()
        assert all(np.isclose(row[k], other[k], atol=1e-5) for k in row if k != "split")
    cards = [json.loads((cell / "card.json").read_text()) for cell in (here, alone)]
    for key in ("config_hash", "base_hash", "data_hash", "counts", "seeds"):
        assert cards[0][key] == cards[1][key]
    assert [card["program"]["K"] for card in cards] == [4, 1]
    assert cards[0]["seconds"]["shared_by"] == 4


def test_the_adapter_of_a_packed_cell_scores_what_its_card_says(packed):
    cell = packed / "cells" / "all-r2"
    card = json.loads((cell / "card.json").read_text())
    for merged in (False, True):
        again, _ = evaluate_cell(cell, merged=merged)
        assert again.loss == pytest.approx(card["metrics"]["test"]["loss"], abs=1e-5)


def test_stopped_in_any_way_it_ends_with_the_same_bits(make_config, packed, tmp_path, capfd):
    def go(*stop, expect):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, *stop)
            with pytest.raises(expect) as caught:
                run(sweep_of(make_config, DECAY), tmp_path, command="lora-jax sweep …")
        return str(caught.value)

    go(PackBatches, "at", 4, crash, expect=Crash)
    said = go(PackBatches, "at", 2, interrupt, expect=Interrupted)
    assert "SIGINT at step 2 of 12" in said and said.endswith("To go on: lora-jax sweep …")
    said = go(EvalBatches, "__getitem__", 1, terminate, expect=Interrupted)
    assert "SIGTERM at step 4" in said
    go(PackBatches, "at", 3, crash, expect=Crash)
    # A full disk ends the pack's cells, not the program: it is told for each.
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, ocp.CheckpointManager, "save", 1, no_space)
        results = run(sweep_of(make_config, DECAY), tmp_path)
    assert all("No space left" in str(result) for result in results.values())
    # All trained; ends while the second cell's results are written.
    go(stored, "write_results", 2, crash, expect=Crash)
    cards = sorted(tmp_path.glob("cells/*/card.json"))
    assert len(cards) == 1
    before = cards[0].stat().st_mtime_ns
    run(sweep_of(make_config, DECAY), tmp_path)
    assert cards[0].stat().st_mtime_ns == before
    assert everything(tmp_path) == everything(packed)
    assert "Traceback" not in capfd.readouterr().err


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_finished_sweep_is_not_run_again(make_config, packed, monkeypatch):
    before = everything(packed)
    monkeypatch.setattr(runner, "load_base", crash)
    run(sweep_of(make_config, DECAY), packed)
    assert everything(packed) == before


@pytest.mark.slow
def test_a_frozen_new_head_is_that_of_the_packs_own_seed(make_config, tmp_path):
    """Two packs, since a head that stays as it was drawn is not the same for two seeds."""
    own = {"method.train": "", "method.rank": 2}
    cells = {
        f"s{seed}-{part}": {**own, "seed": seed, "method.alpha": alpha}
        for seed in (1, 2)
        for part, alpha in (("a", 4.0), ("b", 8.0))
    }
    results = run(sweep_of(make_config, DECAY, cells), tmp_path / "packed")
    assert [result.program.K for result in results.values()] == [2] * 4
    for name in ("s1-a", "s2-a"):
        config = make_config({**DECAY, **cells[name]})
        alone = train(config, tmp_path / "alone", name, progress=False)
        losses = [card.metrics.test.loss for card in (alone, results[name])]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        again, _ = evaluate_cell(tmp_path / "packed" / "cells" / name)
        assert again.loss == pytest.approx(losses[1], abs=1e-6)


def test_how_often_a_run_logs_does_not_break_up_a_begun_pack(make_config, packed, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, stored, "write_results", 2, crash)
        with pytest.raises(Crash):
            run(sweep_of(make_config, DECAY), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackBatches, "at", crash)  # nothing is trained again
        results = run(sweep_of(make_config, {**DECAY, "train.log_every_steps": 6}), tmp_path)
    assert [result.program.K for result in results.values()] == [4] * 4


@pytest.mark.slow
def test_running_out_of_memory_names_the_way_out_and_leaves_the_pack_unbegun(make_config, tmp_path):
    def exhausted():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    sweep = sweep_of(make_config, {"train.num_steps": 2}, {f"s{k}": {"seed": k} for k in range(2)})
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, PackBatches, "at", 2, exhausted)
        results = run(sweep, tmp_path)
    assert all("--memory-gib" in str(result) for result in results.values())
    # A smaller budget then counts: one by one, the cells do run (or say that they cannot either).
    small = run(sweep, tmp_path, memory_bytes=1000)
    assert all("one cell alone needs" in str(result) for result in small.values())


@pytest.mark.slow
def test_a_signal_between_trainings_stops_the_sweep(make_config, tmp_path):
    cells = {**CELLS, "full": {"method.name": "full"}}
    sweep = sweep_of(make_config, {"train.num_steps": 1}, cells)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, stored, "write_results", 4, interrupt)
        with pytest.raises(Interrupted, match="SIGINT with 4 cells done"):
            run(sweep, tmp_path)
    assert not (tmp_path / "cells" / "full").exists()
    assert len(run(sweep, tmp_path)) == 5


def test_missing_metrics_are_told_not_made_up(make_config, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, PackBatches, "at", 9, crash)
        with pytest.raises(Crash):
            run(sweep_of(make_config, DECAY), tmp_path)
    (tmp_path / "cells" / "qv-r1" / "metrics.jsonl").unlink()
    results = run(sweep_of(make_config, DECAY), tmp_path)
    assert not any(isinstance(result, RequestError) for result in results.values())
    assert "lines are missing or damaged; the training goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pack_keeps_its_cells_and_slots(make_config, packed, tmp_path):
    """Begun with four cells, gone on with by a sweep that asks for other ones too."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, PackBatches, "at", 7, crash)
        with pytest.raises(Crash):
            run(sweep_of(make_config, DECAY), tmp_path)
    cells = {"new": {"method.rank": 3}, "up-r8": CELLS["up-r8"]}
    results = run(sweep_of(make_config, DECAY, cells), tmp_path)
    assert set(results) == {*CELLS, "new"}
    assert results["new"].program.K == 1
    whole = everything(packed)
    assert {name: everything(tmp_path)[name] for name in CELLS} == {n: whole[n] for n in CELLS}


def test_a_cell_that_diverges_is_reported_and_changes_no_neighbours_bits(
    make_config, packed, tmp_path
):
    cells = {**CELLS, "qv-r4": {"method.rank": 4, "optimizer.lr": 1e30, "method.alpha": 4.0}}
    results = run(sweep_of(make_config, DECAY, cells), tmp_path)
    assert "loss is nan at step" in str(results["qv-r4"])
    assert not (tmp_path / "cells" / "qv-r4" / "card.json").exists()
    for name in CELLS.keys() - {"qv-r4"}:
        here, there = everything(tmp_path)[name], everything(packed)[name]
        assert here["weights"] == there["weights"] and here["rows"] == there["rows"]
    # It would end there again, so it does not run again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load_base", crash)
        again = run(sweep_of(make_config, DECAY, cells), tmp_path)
    assert "loss is nan" in str(again["qv-r4"])


STOPPING = {
    "train.num_steps": 60,
    "train.eval_every_steps": 4,
    "train.patience": 2,
    "train.log_every_steps": 3,
}
# Two learn, the others stand still and stop at the third look.
STOPPED = {
    name: {**own, "optimizer.lr": 2e-3 if k > 1 else 0.0}
    for k, (name, own) in enumerate(CELLS.items())
}


@pytest.mark.slow
def test_an_early_stop_and_a_repacked_pack_survive_a_crash(make_config, tmp_path):
    whole = tmp_path / "whole"
    results = run(sweep_of(make_config, STOPPING, STOPPED), whole)
    steps = [result.metrics.steps for result in results.values()]
    assert steps[:2] == [12, 12] and min(steps[2:]) >= 16
    cut = tmp_path / "cut"
    for number in (10, 5, 3):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, PackBatches, "at", number, crash)
            with pytest.raises(Crash):
                run(sweep_of(make_config, STOPPING, STOPPED), cut)
    run(sweep_of(make_config, STOPPING, STOPPED), cut)
    assert everything(cut) == everything(whole)


def test_verify_trains_the_pack_again_with_the_same_bits_and_a_cell_alone_to_rounding(packed):
    folder = packed / "cells" / "all-r2"
    verdicts = verify(folder, progress=False)
    assert [v.cell for v in verdicts] == list(CELLS)
    assert all(v.same and v.exact and not v.differences for v in verdicts)
    (alone,) = verify(folder, alone=True, progress=False)
    assert alone.same and not alone.exact and max(alone.loss_differences.values()) < 1e-5


def test_verify_finds_what_was_changed(packed, tmp_path, monkeypatch):
    # What training it again gives is seen above; here it is what the pack left.
    shutil.copytree(packed / "cells", tmp_path / "cells")

    def as_trained(cells, base, at_once, workdir, view):
        shutil.copytree(tmp_path / "cells", workdir / "cells")

    monkeypatch.setattr("lora_jax.sweeps.verify._train_pack", as_trained)
    folder = packed / "cells" / "qv-r4"
    assert all(v.same and v.exact for v in verify(folder, progress=False))
    card = json.loads((folder / "card.json").read_text())

    def changed(**changes):
        (folder / "card.json").write_text(json.dumps({**card, **changes}))
        try:
            return verify(folder, progress=False)
        finally:
            (folder / "card.json").write_text(json.dumps(card))

    tensors = folder / "adapter" / "trainable.safetensors"
    good = tensors.read_bytes()
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "adapter's weights have the hash" in verify(folder, progress=False)[1].differences[0]
    tensors.write_bytes(good)
    predictions = folder / "test_predictions.npz"
    good = predictions.read_bytes()
    predictions.write_bytes(good[:100])
    with pytest.raises(RequestError, match=r"test_predictions\.npz"):
        verify(folder, progress=False)
    predictions.write_bytes(good)

    found = changed(metrics={**card["metrics"], "weights_sha256": "0" * 64})
    assert [v.same for v in found] == [True, False, True, True]
    assert "weights_sha256" in found[1].differences[0]
    # On another device rounding may differ, so only the losses count.
    found = changed(
        device={**card["device"], "kind": "other"},
        metrics={**card["metrics"], "weights_sha256": "0" * 64},
    )
    assert all(v.same and not v.exact for v in found) and "device kind" in found[0].conditions[0]
    faster = {**card["config"], "optimizer": {**card["config"]["optimizer"], "lr": 0.5}}
    with pytest.raises(RequestError, match="does not have the hash"):
        changed(config=faster)
    with pytest.raises(RequestError, match="data have changed"):
        changed(data_hash="0" * 64)


def start(configs, workdir):
    path = workdir / "configs.json"
    path.write_text(json.dumps(configs), encoding="utf-8")
    command = [sys.executable, "-m", "tests.sweeps.run_sweep", str(path), str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(make_config, tmp_path):
    """A pack that stops cells early, has one that diverges, and repacks; another; a cell alone."""
    long = {
        **STOPPING,
        "train.num_steps": 80,
        "train.checkpoint_every_steps": 2,
        "train.patience": 5,
    }
    cells = {
        **STOPPED,
        "nan": {"method.rank": 2, "optimizer.lr": 1e30},
        "wide-a": {"method.rank": 9, "seed": 3},
        "wide-b": {"method.rank": 12},
        "full": {"method.name": "full", "optimizer.lr": 1e-3},
    }
    sweep = sweep_of(make_config, long, cells)
    configs = {cell.name: plain_config(cell.config) for cell in sweep.cells}
    whole = tmp_path / "whole"
    results = run(sweep, whole)
    # Two stood still and one diverged: two of five went on, in a narrower program.
    assert [results[name].metrics.steps for name in list(STOPPED)[:2]] == [24, 24]
    moments, kills, cards_seen = random.Random(0), 0, 0
    for number in itertools.count():
        workdir = tmp_path / f"killed-{number}"
        workdir.mkdir()
        finished: dict = {}
        while kills < 20:
            process = start(configs, workdir)
            before = checkpoints(workdir)
            wait_for(process, lambda: checkpoints(workdir) != before)  # noqa: B023
            time.sleep(moments.uniform(0.0, 1.5))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                break  # it came to its end first: compared below, and another one is begun
            kills += 1
            # What is finished is never touched again.
            for path in workdir.glob("cells/*/card.json"):
                now = os.stat(path).st_mtime_ns
                assert finished.setdefault(path, now) == now
        cards_seen += len(finished)
        run(sweep, workdir)
        for path, when in finished.items():
            assert os.stat(path).st_mtime_ns == when
        assert everything(workdir) == everything(whole)
        if kills == 20:
            break
    assert cards_seen >= 4, "no kill came after a pack had ended"


def checkpoints(workdir):
    return {str(path) for path in workdir.glob("*/*/checkpoints/*")}
