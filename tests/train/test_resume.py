"""A training stopped in any way and run again ends where an uninterrupted one does."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.data import EvalBatches, TrainIterator
from lora_jax.train import Interrupted, train
from lora_jax.train import run as loop_module
from tests.train.conftest import ROOT
from tests.train.results import results_of


@pytest.fixture(scope="module")
def uninterrupted(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train(make_config(), workdir, progress=False)
    return workdir / "cells" / "run"


class Crash(Exception):
    """Stands for whatever ends a process."""


def at_call(monkeypatch, owner, name, number, action):
    """Calls `action` before the `number`-th call of `owner.name`."""
    real, count = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_stopped_again_and_again_ends_with_the_same_bits(
    make_config, uninterrupted, tmp_path, capfd
):
    """Checkpoints fall on steps 4, 8 and 12; each stop is one a user can meet."""

    def go(*stop, expect=None):
        with pytest.MonkeyPatch.context() as patch:
            if stop:
                at_call(patch, *stop)
            with pytest.raises(expect) as caught:
                train(make_config(), tmp_path, progress=False, command="lora-jax train …")
        return str(caught.value)

    # Before the first checkpoint: begins anew. A line of metrics was written and is taken back.
    go(TrainIterator, "__next__", 4, crash, expect=Crash)
    # Ctrl-C in step 2: saved there, with two steps that the metrics do not know yet.
    said = go(TrainIterator, "__next__", 2, interrupt, expect=Interrupted)
    assert "stopped by SIGINT at step 2 of 12" in said
    assert said.endswith("To go on: lora-jax train …")
    # SIGTERM in the middle of the evaluation at step 4: the evaluation is done again.
    said = go(EvalBatches, "__getitem__", 1, terminate, expect=Interrupted)
    assert "stopped by SIGTERM at step 4" in said
    # Between two checkpoints: steps are trained again.
    go(TrainIterator, "__next__", 3, crash, expect=Crash)
    # No space for the checkpoint of step 8: it is one line to the user, step 4's is still good.
    said = go(ocp.CheckpointManager, "save", 1, no_space, expect=RequestError)
    assert "step 8" in said and "No space left" in said
    # All trained; ends while the adapter is written, then while the card is.
    go(loop_module, "write_results", 1, crash, expect=Crash)
    assert not (tmp_path / "cells" / "run" / "card.json").exists()
    card = train(make_config(), tmp_path, progress=False)
    assert results_of(tmp_path / "cells" / "run") == results_of(uninterrupted)
    assert card.metrics.steps == 12
    assert "Traceback" not in capfd.readouterr().err


def test_finished_run_is_not_run_again(make_config, uninterrupted, monkeypatch):
    monkeypatch.setattr(loop_module, "build", crash)
    before = (uninterrupted / "card.json").read_bytes()
    card = train(make_config(), uninterrupted.parent.parent, progress=False)
    assert card.to_json() == json.loads(before)
    assert (uninterrupted / "card.json").read_bytes() == before


def start(config, workdir):
    path = workdir / "config_to_train.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "tests.train.run_cell", str(path), str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def wait_for(process, ready, *, timeout_s=120.0):
    """Polls until `ready()`; the process may end before."""
    deadline = time.monotonic() + timeout_s
    while not ready() and process.poll() is None:
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.001)


def is_writing(cell):
    return any((cell / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def test_killed_while_a_checkpoint_is_written(make_config, uninterrupted, tmp_path):
    cell = tmp_path / "cells" / "run"
    process = start(make_config(), tmp_path)
    wait_for(process, lambda: is_writing(cell))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (cell / "card.json").exists()
    train(make_config(), tmp_path, progress=False)
    assert results_of(cell) == results_of(uninterrupted)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(make_config, tmp_path):
    """One run, killed twenty times: every other time while a checkpoint is being written."""
    settings = {
        "train.num_steps": 240,
        "train.eval_every_steps": 4,
        "train.checkpoint_every_steps": 2,
    }
    config = make_config(settings)
    whole = tmp_path / "whole"
    train(config, whole, progress=False)
    workdir = tmp_path / "killed"
    workdir.mkdir()
    cell = workdir / "cells" / "run"
    moments, kills, during_writing = random.Random(0), 0, 0
    while kills < 20:
        process = start(config, workdir)
        before = set((cell / "checkpoints").glob("*"))
        # It is at work again once the checkpoints have changed.
        wait_for(process, lambda: set((cell / "checkpoints").glob("*")) != before)  # noqa: B023
        time.sleep(moments.uniform(0.0, 0.3))
        if kills % 2:
            wait_for(process, lambda: is_writing(cell))
            time.sleep(moments.uniform(0.0, 0.02))
        during_writing += is_writing(cell)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed 20 times"
        kills += 1
        assert not (cell / "card.json").exists()
    train(config, workdir, progress=False)
    assert during_writing >= 5
    assert results_of(cell) == results_of(whole / "cells" / "run")
