"""A stand-in hub, huggingface_hub turned to it, and one packed sweep of two seeds to push."""

from __future__ import annotations

import shutil
import time

from huggingface_hub import constants
import pytest

from lora_jax.sweeps import Cell, Sweep, run_sweep
from tests.hub.server import TOKEN, running
from tests.sweeps.conftest import make_config, reviews_file

__all__ = ["make_config", "reviews_file"]

CELLS = ("r2-s0", "r2-s1")


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, with HF_ENDPOINT and its likes as a process of its own would have read them."""
    with running() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
        yield hub


@pytest.fixture(scope="session")
def trained(make_config, tmp_path_factory):
    """A workdir with two cells of one program that differ in the seed."""
    workdir = tmp_path_factory.mktemp("hub") / "runs"
    settings = {"train.num_steps": 4, "method.rank": 2}
    cells = [
        Cell(name, make_config({**settings, "seed": seed})) for seed, name in enumerate(CELLS)
    ]
    results = run_sweep(Sweep("seeds", tuple(cells)), workdir, progress=False)
    assert [results[name].program.K for name in CELLS] == [2, 2]
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(trained, tmp_path / "runs")
