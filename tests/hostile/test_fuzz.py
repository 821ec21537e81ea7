"""Folders of strangers, damaged at random: one line or success, in seconds, nothing else touched.

`make test-slow` makes 2,000 mutations. LORA_JAX_FUZZ_SEED begins at another seed, and
LORA_JAX_FUZZ_COUNT sets how many; a failure names the case and the seed that make it again.
"""

from __future__ import annotations

import os

import pytest

from tests.hostile.folders import copy_models, make_folders
from tests.hostile.fuzz import CASES, Fuzzer

FIRST = int(os.environ.get("LORA_JAX_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("LORA_JAX_FUZZ_COUNT", "2000"))
SHARES = {**{name: case.weight for name, case in CASES.items()}, "flags": 4}
# In the fast suite: folders that nothing is trained for; test_records.py has what fell of others.
SMOKE = {"peft": 20, "model": 30}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    make_folders(folder)
    return folder


@pytest.fixture
def fuzzer(home, monkeypatch):
    monkeypatch.chdir(home)
    return Fuzzer(home)


def mutate(fuzzer: Fuzzer, name: str, seeds: range, capture) -> None:
    for seed in seeds:
        if name == "flags":
            fuzzer.flags(seed, capture)
        else:
            fuzzer.case(name, seed, capture)
    with capture.disabled():
        print(f"\n{name}: seeds {seeds.start} to {seeds.stop - 1}")
    assert not fuzzer.fallen, "\n\n".join([f"{len(fuzzer.fallen)} fell:", *fuzzer.fallen[:20]])


@pytest.mark.parametrize("name", SMOKE)
def test_a_few_damaged_folders_are_one_line_or_read(tmp_path, monkeypatch, name, capfd):
    copy_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.hostile.fuzz.FEW", 1)
    fuzzer = Fuzzer(tmp_path)
    fuzzer.warm_up(capfd, name)
    mutate(fuzzer, name, range(SMOKE[name]), capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_damaged_folders_are_one_line_or_read(fuzzer, name, capfd):
    fuzzer.warm_up(capfd, name)
    count = -(-COUNT * SHARES[name] // sum(SHARES.values()))
    mutate(fuzzer, name, range(FIRST, FIRST + count), capfd)
