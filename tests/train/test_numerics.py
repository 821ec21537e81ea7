"""What decides about the bits is recorded, compared on resuming and named by `verify`."""

import dataclasses
import json

import jax
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.data import TrainIterator
from lora_jax.sweeps.verify import _conditions
from lora_jax.train import Interrupted, train
from lora_jax.train.environment import NOTED, REFUSED, check_resumed, differences, numerics
from tests.train.results import results_of
from tests.train.test_resume import at_call, interrupt


def test_the_record_is_json_and_agrees_with_itself():
    record = json.loads(json.dumps(numerics()))
    assert differences(record) == {} and check_resumed(record, "here") == ()
    assert differences({}) == {}  # of a checkpoint from before there was a record


@pytest.mark.parametrize("name", REFUSED)
def test_another_computation_is_refused_by_the_setting_s_name(name):
    with pytest.raises(RequestError, match=REFUSED[name]):
        check_resumed(numerics() | {name: "other"}, "runs/a/checkpoints")


@pytest.mark.parametrize("name", NOTED)
def test_other_rounding_is_noted(name):
    (note,) = check_resumed(numerics() | {name: "other"}, "runs/a/checkpoints")
    assert note.startswith(f"{name} was 'other', then ")


def stop_after_step_5(make_config, workdir):
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, TrainIterator, "__next__", 6, interrupt)
        with pytest.raises(Interrupted):
            train(make_config(), workdir, progress=False)


@pytest.fixture
def restored():
    names = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_run_resumed_with_another_prng_has_the_same_bits(
    make_config, tmp_path, monkeypatch, restored
):
    train(make_config(), tmp_path / "whole", progress=False)
    stop_after_step_5(make_config, tmp_path / "stopped")
    jax.config.update("jax_default_prng_impl", "rbg")
    jax.config.update("jax_threefry_partitionable", False)
    monkeypatch.setenv("XLA_FLAGS", "--other")  # XLA read it when the process began
    card = train(make_config(), tmp_path / "stopped", progress=False)
    runs = [results_of(tmp_path / name / "cells" / "run") for name in ("whole", "stopped")]
    assert runs[0] == runs[1]
    (note,) = card.program.numerics_changes
    assert note.startswith("xla_flags was ") and note.endswith("then '--other'")
    assert any(note in condition for condition in _conditions(card))


def test_a_run_resumed_with_x64_is_refused_by_name(make_config, tmp_path, restored):
    stop_after_step_5(make_config, tmp_path)
    jax.config.update("jax_enable_x64", True)
    with pytest.raises(RequestError, match="JAX_ENABLE_X64=False"):
        train(make_config(), tmp_path, progress=False)


def test_verify_names_the_setting_that_differs(make_config, tmp_path, restored):
    card = train(make_config({"train.num_steps": 4}), tmp_path, progress=False)
    assert _conditions(card) == []
    jax.config.update("jax_enable_x64", True)
    assert _conditions(card) == ["JAX_ENABLE_X64 was False, is True"]
    earlier = dataclasses.replace(card, program=dataclasses.replace(card.program, numerics=None))
    assert _conditions(earlier) == []
