import subprocess

import jax
import pytest

from lora_jax.train import card as card_module
from lora_jax.train.card import git_commit, make_card, versions

PARTS = ("config", "config_hash", "base_hash", "data_hash", "seeds", "device", "program", "counts",
         "seconds", "metrics")  # fmt: skip


def test_versions_are_those_that_run():
    assert versions()["jax"] == jax.__version__
    assert set(versions()) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "lora_jax"}


def test_a_card_with_a_gap_is_a_bug():
    whole = dict.fromkeys(PARTS, "x")
    assert make_card(**whole).keys() == {*PARTS, "versions", "commit", "finished"}
    for part in PARTS:
        with pytest.raises(TypeError, match=part):
            make_card(**{name: value for name, value in whole.items() if name != part})


def test_commit_is_that_of_the_package_or_unknown(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "lora_jax" / "train" / "card.py"
    file.parent.mkdir(parents=True)
    file.write_text("one")
    monkeypatch.setattr(card_module, "__file__", str(file))
    git("init")
    assert git_commit() == "unknown"  # in a repository, but none of its files
    git("add", ".")
    git("commit", "-m", "one")
    assert git_commit() == git("rev-parse", "HEAD")
    file.write_text("two")
    assert git_commit() == git("rev-parse", "HEAD") + "+dirty"
    monkeypatch.setenv("PATH", "")  # no git at all
    assert git_commit() == "unknown"
