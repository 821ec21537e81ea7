"""One version, of which the rest is made; what `--version` says of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jaxlib
import yaml

import lora_jax as lj
from lora_jax import _versions
from lora_jax._versions import git_commit, versions
from lora_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


def released() -> list[tuple[str, str]]:
    """`(version, date)` of the headings of CHANGELOG.md, newest first, without Unreleased."""
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^## \[(.+?)\](?: - (.+))?$", page, re.M)
    assert first == ("Unreleased", "")
    return others


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = (lj.__version__, str(citation["date-released"]))
    assert released()[0] == newest
    assert str(citation["version"]) == lj.__version__


def test_the_build_reads_the_version_where_the_package_says_it():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in pyproject["project"] and pyproject["project"]["dynamic"] == ["version"]
    source = (ROOT / pyproject["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.M) == [lj.__version__]


def test_versions_are_newest_first():
    numbers = [tuple(map(int, version.split("."))) for version, _ in released()]
    dates = [date for _, date in released()]
    assert numbers == sorted(set(numbers), reverse=True) and dates == sorted(dates, reverse=True)


def test_versions_are_those_that_run():
    assert versions()["jax"] == jax.__version__
    assert versions()["lora_jax"] == lj.__version__
    assert set(versions()) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "lora_jax"}


def test_commit_is_that_of_the_package_or_unknown(tmp_path, monkeypatch, capsys):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "lora_jax" / "_versions.py"
    file.parent.mkdir(parents=True)
    file.write_text("one")
    monkeypatch.setattr(_versions, "__file__", str(file))
    monkeypatch.delenv("LORA_JAX_COMMIT", raising=False)
    git("init")
    assert git_commit() == "unknown"  # in a repository, but none of its files
    assert main(["--version"]) == 0
    assert "commit" not in capsys.readouterr().out
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit() == commit
    file.write_text("two")
    assert git_commit() == f"{commit}+dirty"
    assert main(["--version"]) == 0
    expected = (
        f"lora_jax {lj.__version__}, commit {commit}+dirty, jax {jax.__version__}, "
        f"jaxlib {jaxlib.version.__version__}, python {sys.version.split()[0]}\n"
    )
    assert capsys.readouterr().out == expected
    monkeypatch.setenv("PATH", "")  # no git at all
    assert git_commit() == "unknown"
    monkeypatch.setenv("LORA_JAX_COMMIT", "abc")
    assert git_commit() == "abc"


def test_the_version_does_not_wait_for_jax():
    code = "import sys, lora_jax.cli.main as m; m.main(['--version']); "
    code += "assert not {'jax', 'numpy'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
