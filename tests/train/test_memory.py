"""The memory of a step: said before it begins, and refused where it does not fit."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.train import run as loop
from lora_jax.train.memory import StepMemory, num_bytes
from lora_jax.train.run import train


def compiled_step(num_rows):
    """One donated matrix, a frozen one, a batch of `num_rows`; what it makes beside is known."""

    def step(state, frozen, batch):
        h = jnp.tanh(batch @ frozen)
        return state - 0.1 * h.T @ h, h.sum()

    shapes = [(256, 256), (64, 256), (num_rows, 64)]
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(step, donate_argnums=0).lower(*structs).compile(), structs


def test_the_parts_are_what_was_asked_for():
    compiled, (state, frozen, _) = compiled_step(1000)
    found = StepMemory.of(compiled, base=frozen, state=state, limit=10**9)
    assert (found.base, found.state) == (64 * 256 * 4, 256 * 256 * 4)
    assert found.batch == 1000 * 64 * 4
    # The hidden matrix is there whole; the donated state is not there twice.
    assert 1000 * 256 * 4 <= found.temporaries < 2.5 * 1000 * 256 * 4
    found.check()


def test_what_does_not_fit_is_refused_with_the_sum():
    compiled, (state, frozen, _) = compiled_step(1000)
    found = StepMemory.of(compiled, base=frozen, state=state, limit=2**20)
    with pytest.raises(
        lj.RequestError, match=r"does not fit: .* = base 0\.06 \+ .* of 1\.00 MiB"
    ) as e:
        found.check()
    assert "train.accumulate_steps" in str(e.value) and "model.quantize" not in str(e.value)
    with pytest.raises(lj.RequestError, match="model.quantize=nf4"):
        StepMemory(base=900, state=10, batch=0, temporaries=200, limit=1000).check()


def test_training_says_it_first_and_writes_nothing_where_it_cannot(
    make_config, tmp_path, capsys, monkeypatch
):
    config = make_config({})
    with monkeypatch.context() as patched:
        patched.setattr(loop, "device_limit_bytes", lambda num_devices: 10_000)
        with pytest.raises(lj.RequestError, match="a train step does not fit"):
            train(config, tmp_path / "work")
        assert not (tmp_path / "work" / "cells" / "run").exists()
    train(config, tmp_path / "work")
    assert "run: a step takes " in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"train.accumulate_steps": 4, "train.remat": "nothing_saveable"},
        {"model.quantize": "nf4", "model.double_quant": False},
    ],
)
def test_settings_that_a_config_may_lack_train_the_same_cells(change, make_config, tmp_path):
    """Parts, remat: the same losses; four bits: a run that is verified, merged and evaluated."""
    plain = make_config({"method.dropout": 0.0})
    changed = plain.replace(change)
    cards = [train(c, tmp_path / n, progress=False) for n, c in (("a", plain), ("b", changed))]
    losses = [card.metrics.test.loss for card in cards]
    if "model.quantize" not in change:
        assert losses[1] == pytest.approx(losses[0], abs=2e-5)
        assert cards[0].base_hash == cards[1].base_hash
        return
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], abs=0.2)
    assert cards[0].base_hash != cards[1].base_hash


def test_what_lies_in_the_hosts_memory_is_none_of_the_devices():
    """On an accelerator; on CPU both are one, and XLA counts it among the arguments."""

    def array(kind, platform):
        device = types.SimpleNamespace(platform=platform)
        where = types.SimpleNamespace(
            memory_kind=kind, device_set={1: device}.values(), shard_shape=lambda shape: (2, 4)
        )
        return types.SimpleNamespace(
            shape=(8, 4), size=32, dtype=np.dtype("float32"), sharding=where
        )

    tree = [array("device", "tpu"), array("pinned_host", "tpu"), array("pinned_host", "cpu")]
    assert [num_bytes(one, of_a_device=True) for one in tree] == [32, 0, 32]
    assert [num_bytes(one) for one in tree] == [128, 128, 128]
