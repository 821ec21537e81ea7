"""A sweep of a variant with one number per kernel: a part of no axes on a plain kernel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.io.run_adapter import load_trainable
from lora_jax.serve.adapters import load_adapter
from lora_jax.settings import Settings
from lora_jax.sweeps import Cell, run_sweep
from lora_jax.sweeps.pack import make_pack
from lora_jax.train import train
from lora_jax.train.build import keys_of
from tests.sweeps.problem import AXES, base, batches_of, loss_fn, training_of
from tests.sweeps.stored_problem import sweep_of


@dataclasses.dataclass(frozen=True)
class Gated(lj.LoRA):
    """ΔW = scale · gate · a @ b."""

    PARTS: ClassVar = {"a": "sir", "b": "sro", "gate": "s"}

    def init_parts(self, key, kernel, site):
        parts = super().init_parts(key, kernel, site)
        gate = jnp.full(site.part_shape("s"), 0.5, parts["a"].dtype)
        return {**parts, "b": parts["b"] + 0.1, "gate": gate}

    def factors(self, parts, site):
        ones = (1,) * (parts["a"].ndim - parts["gate"].ndim)
        return parts["a"] * parts["gate"].reshape(*parts["gate"].shape, *ones), parts["b"]


def gated(targets, rank, alpha=2.0):
    return Gated(targets=targets, rank=rank, alpha=alpha, axes=AXES, train="head")


CELLS = [gated("up", 1), gated(("up", "layers"), 4, 4.0), gated("down", 3)]


def test_unpack_gives_each_cell_the_parts_it_starts_with_alone():
    pack = make_pack([Cell(str(k), Settings(), own) for k, own in enumerate(CELLS)], base())
    keys = [keys_of(seed)[1] for seed in range(3)]
    packed = pack.init(keys, [base()] * 3)
    for k, (method, key) in enumerate(zip(CELLS, keys, strict=True)):
        own = pack.unpack(packed[k], k)
        alone, _ = method.init(key, base())
        assert own.keys() == alone.keys()
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, alone)
        jax.tree.map(np.testing.assert_array_equal, own, alone)
        assert packed[k]["up"]["gate"].shape == () and packed[k]["layers"]["gate"].shape == (2,)


def test_cells_of_a_sweep_end_where_they_end_alone():
    cells = [{"method": m, "lr": 1e-2, "seed": k} for k, m in enumerate(CELLS)]
    _, results = training_of(cells, num_steps=5)
    for k in (1,):  # targets and stacked axes that the others lack
        method = CELLS[k]
        one = lj.sweep(
            loss_fn, base(), batches_of, [cells[k]], num_steps=5, axes=AXES, progress=False
        )[0]
        assert not results[k].error and not one.error
        assert results[k].trainable.keys() == method.init(keys_of(k)[1], base())[0].keys()
        np.testing.assert_allclose(results[k].losses, one.losses, rtol=1e-5)
        for path, entry in one.trainable.items():
            for part, value in entry.items():
                found = results[k].trainable[path][part]
                assert found.shape == value.shape
                np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5)
        trained = [e["gate"] for e in results[k].trainable.values() if "gate" in e]
        assert all(np.all(np.asarray(gate) != 0.5) for gate in trained)


@pytest.fixture
def known(register):
    register("gated", Gated)


def test_a_sweep_on_disk_runs_end_to_end(known, make_config, tmp_path):
    changes = {"method.name": "gated", "method.alpha": 4.0, "train.num_steps": 2}
    cells = {"q-r1": {"method.rank": 1, "method.targets": "q"}, "qv-r4": {"method.rank": 4}}
    results = run_sweep(sweep_of(make_config, changes, cells), tmp_path, progress=False)
    for name, own in cells.items():
        assert results[name].program.K == 2
        train(make_config({**changes, **own}), tmp_path / "alone", name, progress=False)
        folders = [tmp_path / "cells" / name, tmp_path / "alone" / "cells" / name]
        (ours, _), (theirs, _) = (load_trainable(folder / "adapter") for folder in folders)
        assert ours.keys() == theirs.keys()
        for path, entry in ours.items():
            for part, value in entry.items():
                assert value.shape == theirs[path][part].shape
                np.testing.assert_allclose(value, theirs[path][part], rtol=1e-3, atol=1e-4)
        assert any(entry["gate"].shape == () for entry in ours.values() if "gate" in entry)
        assert load_adapter(folders[0] / "adapter").trainable.keys() == ours.keys()
