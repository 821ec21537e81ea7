"""Callbacks see the same of a run alone and of a pack, and each may stop the training."""

import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.sweeps import run_sweep
from lora_jax.train import Callback, Interrupted, train
from tests.sweeps.stored_problem import sweep_of
from tests.train.results import results_of

CELLS = {"r1": {"method.rank": 1}, "r2": {"method.rank": 2}}


class Noted(Callback):
    """Notes the events of each cell, by its name, and asks to stop after `stop_at` steps."""

    def __init__(self, stop_at=None):
        self.events, self.step, self._stop_at = {}, 0, stop_at

    def note(self, training, k, event):
        self.events.setdefault(training.cells[k].settings.name, []).append((training.step, event))

    def logged(self, training, k, values):
        self.note(training, k, "logged")

    def evaluated(self, training, k, values):
        self.note(training, k, "evaluated")

    def tested(self, training, k, test):
        self.note(training, k, "tested")

    def failed(self, training, k, what, step):
        self.note(training, k, f"failed: {what}")

    def advanced(self, training):
        self.step = training.step

    def stop_requested(self):
        return "the test" if self.step == self._stop_at else ""


def test_a_run_alone_and_each_cell_of_a_pack_tell_the_same_events(make_config, tmp_path):
    alone, packed = Noted(), Noted()
    for name, own in CELLS.items():
        train(make_config(own), tmp_path / "alone", name, progress=False, callbacks=[alone])
    run_sweep(sweep_of(make_config, {}, CELLS), tmp_path / "pack", progress=False,
              callbacks=[packed])  # fmt: skip
    assert alone.events == packed.events and set(alone.events) == set(CELLS)
    # Logs every 3 steps, evaluations every 4, of 12.
    assert [step for step, event in alone.events["r1"] if event == "logged"] == [3, 6, 9, 12]
    assert [step for step, event in alone.events["r1"] if event == "evaluated"] == [4, 8, 12]
    assert alone.events["r1"][-1] == (12, "tested")


def test_a_callback_that_asks_to_stop_leaves_a_run_that_goes_on(make_config, tmp_path):
    config = make_config(CELLS["r1"])
    with pytest.raises(Interrupted, match="stopped by the test at step 5 of 12"):
        train(config, tmp_path / "cut", progress=False, callbacks=[Noted(stop_at=5)])
    train(config, tmp_path / "cut", progress=False)
    train(config, tmp_path / "whole", progress=False)
    cut, whole = (tmp_path / name / "cells" / "run" for name in ("cut", "whole"))
    assert results_of(cut) == results_of(whole)


def test_a_callback_that_stops_a_sweep_in_memory_keeps_what_was_trained():
    params = {"w": jnp.eye(4)}
    cells = [{"targets": "w", "rank": 1, "lr": 1e-2}, {"method": "full", "lr": 1e-2}]
    found = lj.sweep(
        lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), params, [jnp.ones((2, 4))], cells,
        num_steps=9, progress=False, callbacks=[Noted(stop_at=3)],
    )  # fmt: skip
    assert [len(row.losses) for row in found] == [3, 0]
    assert [row.error for row in found] == ["stopped by the test"] * 2


def test_a_callback_that_asks_to_stop_within_an_evaluation_is_obeyed_before_its_next_batch():
    class StopAtSecondBatch(Callback):
        def __init__(self):
            self.asked = []  # of the evaluation after the only step, batch by batch

        def advanced(self, training):
            self.step = training.step

        def stop_requested(self):
            if getattr(self, "step", 0):
                self.asked.append(self.step)
            return "the test" if len(self.asked) == 2 else ""

    callback = StopAtSecondBatch()
    cells = [{"targets": "w", "rank": 1, "lr": 1e-2}]
    (found,) = lj.sweep(
        lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), {"w": jnp.eye(4)}, [jnp.ones((2, 4))],
        cells, num_steps=1, validation=[jnp.ones((2, 4))] * 5, progress=False,
        callbacks=[callback],
    )  # fmt: skip
    assert callback.asked == [1, 1]  # three of the five batches were not evaluated
    assert found.error == "stopped by the test"
    assert len(found.losses) == 1 and found.validation == ()


def test_a_failed_cell_is_told_with_its_step():
    noted = Noted()
    own = {"targets": "w", "rank": 1, "weight_decay": 1e3}
    cells = [{**own, "lr": lr, "name": name} for name, lr in (("high", 3e38), ("low", 1e-6))]
    found = lj.sweep(
        lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), {"w": jnp.eye(4)}, [jnp.ones((2, 4))],
        cells, num_steps=1, progress=False, callbacks=[noted],
    )  # fmt: skip
    assert found[0].error and not found[1].error
    (event,) = noted.events["high"]
    assert event == (1, "failed: a weight is nan")
