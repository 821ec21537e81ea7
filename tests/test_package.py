"""What a release uploads: an sdist, the wheel built from it, and that wheel in a clean environment.

`make package` builds them into dist/ and runs this file; pip asks the package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lora_jax as lj

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Standard output of a command that sees nothing of this checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "cwd": cwd, "env": env}
    done = subprocess.run([*map(str, command)], **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked(*folders: str) -> set[str]:
    return {*run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders).split()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that `make package` names, or one that is made here."""
    if made := os.environ.get("LORA_JAX_DIST"):
        return ROOT / made
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"lora_jax-{lj.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The programs of an environment that holds the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"{wheel}[all]")
    return folder / "bin"


def test_both_archives_are_of_this_version_and_fit_for_an_index(dist, wheel):
    sdist = dist / f"lora_jax-{lj.__version__}.tar.gz"
    assert {*dist.iterdir()} == {sdist, wheel}
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)


def test_the_sdist_holds_what_the_wheel_is_built_from(dist):
    top = f"lora_jax-{lj.__version__}"
    with tarfile.open(dist / f"{top}.tar.gz") as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    pages = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"}
    made = {"PKG-INFO", ".gitignore"}
    assert names == tracked("lora_jax", "experiments/configs") | pages | made


def test_the_wheel_has_every_file_of_the_package_and_the_configs(wheel):
    configs = tracked("experiments/configs")
    inside = {f"lora_jax/configs/{Path(c).relative_to('experiments/configs')}" for c in configs}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lora_jax/")}
    assert names == tracked("lora_jax") | inside
    assert {"lora_jax/py.typed", "lora_jax/configs/what_rank.py"} <= names


def test_a_run_and_its_report_are_made_by_the_wheel_in_an_empty_folder(environment, tmp_path):
    command, where = environment / "lora-jax", "import lora_jax; print(lora_jax.__file__)"
    place = run(environment / "python", "-c", where, cwd=tmp_path)
    assert Path(place).is_relative_to(environment.parent)
    line = run(command, "--version", cwd=tmp_path)
    assert line.startswith(f"lora_jax {lj.__version__}, jax ")  # a wheel knows no commit
    config = "--config=e2e_smollm2:smoke"
    run(command, "train", config, "--workdir=runs/first", "--no-progress", cwd=tmp_path)
    run(command, "report", "runs/first", cwd=tmp_path)
    card = json.loads((tmp_path / "runs/first/cells/run/card.json").read_text())
    assert card["versions"]["lora_jax"] == lj.__version__ and card["commit"] == "unknown"
    page = (tmp_path / "runs/first/report.html").read_text()
    assert f"{card['metrics']['test']['loss']:.3f}" in page
