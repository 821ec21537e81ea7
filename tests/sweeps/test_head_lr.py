"""The head's own learning rate is data of a pack: its cells end as each does alone."""

import numpy as np

from lora_jax.io.run_adapter import load_trainable
from lora_jax.sweeps import Cell, Sweep, run_sweep
from lora_jax.train import train

CHANGES = {"train.num_steps": 4, "method.dropout": 0.0}
RATES = {"tied": 0.0, "fast": 3e-2, "slow": 1e-4}


def test_cells_with_head_rates_of_their_own_share_a_program_and_end_as_alone(make_config, tmp_path):
    configs = {k: make_config({**CHANGES, "optimizer.head_lr": rate}) for k, rate in RATES.items()}
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
