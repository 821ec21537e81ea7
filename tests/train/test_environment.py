import subprocess

import jax

from lora_jax.train import environment
from lora_jax.train.environment import git_commit, versions


def test_versions_are_those_that_run():
    assert versions()["jax"] == jax.__version__
    assert set(versions()) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "lora_jax"}


def test_commit_is_that_of_the_package_or_unknown(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "lora_jax" / "train" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("one")
    monkeypatch.setattr(environment, "__file__", str(file))
    git("init")
    assert git_commit() == "unknown"  # in a repository, but none of its files
    git("add", ".")
    git("commit", "-m", "one")
    assert git_commit() == git("rev-parse", "HEAD")
    file.write_text("two")
    assert git_commit() == git("rev-parse", "HEAD") + "+dirty"
    monkeypatch.setenv("PATH", "")  # no git at all
    assert git_commit() == "unknown"
