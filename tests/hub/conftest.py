"""A stand-in hub, huggingface_hub turned to it, and one packed sweep of two seeds to push."""

from __future__ import annotations

import shutil
import time
import warnings

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import lora_jax as lj
from lora_jax.sweeps import Cell, Sweep, run_sweep
from tests.hub.server import TOKEN, Repo, running
from tests.sweeps.conftest import make_config, reviews_file

__all__ = ["make_config", "reviews_file"]

REPO = "me/x"
CELLS = ("r2-s0", "r2-s1")


def turn_to(hub, patch):
    """What HF_ENDPOINT and others would have made of the library, which reads them but once."""
    set_endpoint(patch, hub.endpoint)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    set_offline(patch, False)


def set_endpoint(patch, endpoint):
    patch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def set_offline(patch, value):
    patch.setattr(constants, "HF_HUB_OFFLINE", value)
    # Sessions of versions on requests are made for one or the other.
    getattr(_http, "reset_sessions", lambda: None)()


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which huggingface_hub is turned to."""
    with running() as hub:
        turn_to(hub, monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
        yield hub


@pytest.fixture(scope="session")
def trained(make_config, tmp_path_factory):
    """A workdir with two cells of one program that differ in the seed."""
    workdir = tmp_path_factory.mktemp("hub") / "runs"
    settings = {"train.num_steps": 4, "method.rank": 2}
    cells = [Cell(name, make_config({**settings, "seed": seed})) for seed, name in enumerate(CELLS)]
    results = run_sweep(Sweep("seeds", tuple(cells)), workdir, progress=False)
    assert [results[name].program.K for name in CELLS] == [2, 2]
    return workdir


@pytest.fixture(scope="session")
def repository(trained):
    """The files that a push of the first cell makes, by name: pushed once for all tests."""
    with running() as hub, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        turn_to(hub, patch)
        lj.hub.push(trained / "cells" / CELLS[0], REPO, license="apache-2.0")
        return hub.repos[REPO].files()


@pytest.fixture
def pushed(hub, trained, repository):
    """The first cell, whose repository the hub has in its second commit."""
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit("main", repository)
    return trained / "cells" / CELLS[0]


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(trained, tmp_path / "runs")
