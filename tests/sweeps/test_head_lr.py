"""The learning rates of the head and of paths are data of a pack: its cells end as alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.io.run_adapter import load_trainable
from lora_jax.sweeps import Cell, Sweep, run_sweep
from lora_jax.train import train

CHANGES = {"train.num_steps": 4, "method.dropout": 0.0}
RATES = {"tied": 0.0, "fast": 3e-2, "slow": 1e-4}
HEAD, BY_PATH = "optimizer.head_lr", "optimizer.lr_by_path"


@pytest.mark.parametrize("key", [HEAD, BY_PATH])
def test_cells_with_rates_of_their_own_share_a_program_and_end_as_alone(make_config, tmp_path, key):
    # Expressions are part of the program, their learning rates are not.
    own = {
        name: rate if key == HEAD else ((".*/b", 1e-3), ("head/.*", rate)) if rate else ()
        for name, rate in RATES.items()
    }
    configs = {name: make_config({**CHANGES, key: rates}) for name, rates in own.items()}
    cells = tuple(Cell(name, config) for name, config in configs.items())
    results = run_sweep(Sweep("rates", cells), tmp_path / "packed", progress=False)
    assert {name: card.program.K for name, card in results.items()} == {
        "tied": 1, "fast": 2, "slow": 2,
    }  # fmt: skip
    heads = {}
    for name in ("fast", "slow"):
        train(configs[name], tmp_path / "alone", name, progress=False)
        (ours, _), (theirs, _) = (
            load_trainable(tmp_path / place / "cells" / name / "adapter")
            for place in ("packed", "alone")
        )
        for path, entry in theirs.items():
            for part, value in entry.items():
                np.testing.assert_allclose(ours[path][part], value, rtol=1e-3, atol=1e-5)
        heads[name] = np.asarray(ours["head/kernel"]["value"])
    assert np.abs(heads["fast"] - heads["slow"]).max() > 1e-2


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["head"]["v"] - 1.0) ** 2)


BASE = {"w": jnp.eye(4), "head": {"v": jnp.ones((4, 1))}}
CELL = {"targets": "w", "rank": 2, "alpha": 2.0, "train": "head/.*", "lr": 1e-2, "head_lr": 1e-3}


def test_rates_by_path_in_memory_are_those_of_lora_plus():
    """LoRA+ is LoRA with its b at a multiple of the learning rate."""
    batches = [jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)]
    cells = [
        {**CELL, "name": "by path", "lr_by_path": {"w/b": 16e-2}},
        {**CELL, "name": "half", "lr_by_path": {"w/b": 8e-2}},
        {**CELL, "name": "plus", "method": "lora_plus", "ratio": 16.0},
    ]
    found = lj.sweep(loss, BASE, batches, cells, num_steps=5, progress=False)
    ours, half, plus = (row.trainable for row in found)
    for path, entry in plus.items():
        for part, value in entry.items():
            np.testing.assert_allclose(ours[path][part], value, rtol=1e-5, atol=1e-7)
    assert np.abs(half["w"]["b"] - ours["w"]["b"]).max() > 1e-2
    assert [row.pack for row in found] == [1, 1, 2]


def test_rates_that_no_sweep_can_use_are_one_line():
    batches = [jnp.ones((8, 4))]

    def failure(**changes):
        more = {k: changes.pop(k) for k in ("tx",) if k in changes}
        cells = [{**CELL, **changes}, {**CELL, "name": "other"}]
        return lj.sweep(loss, BASE, batches, cells, num_steps=1, progress=False, **more)[0].error

    for wrong in ({"w": -1.0}, {"*": 1e-3}, {"w": "fast"}, ("w", 1e-3), 0.1):
        assert "must be pairs of a regular expression and" in failure(lr_by_path=wrong)
    with pytest.raises(lj.RequestError, match="gives head_lr=0.001, which is AdamW's here"):
        failure(tx=optax.sgd, seed=1)
