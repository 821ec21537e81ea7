"""CI, hooks and CONTRIBUTING call make targets that exist, on the promised Pythons."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {*re.findall(r"^\.PHONY: (.+)$", makefile, re.M)[0].split()}


def steps_of_ci() -> list[str]:
    return [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def entries_of_hooks() -> list[str]:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return [hook["entry"] for hook in repo["hooks"]]


def commands_of_contributing() -> list[str]:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(.+?)^```", page, re.M | re.S)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


@pytest.mark.parametrize("lines", [steps_of_ci, entries_of_hooks, commands_of_contributing])
def test_every_command_is_one_make_target(lines):
    found = lines()
    assert len(found) >= 2
    for command in found:
        make, *options, target = command.split()
        assert make == "make" and {*options} <= {"--no-print-directory"}, command
        assert target in targets(), f"{command}: the Makefile has no such target"


def test_targets_named_in_prose_exist():
    for page in ("CONTRIBUTING.md", "CHANGELOG.md", ".github/pull_request_template.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = {word for words in re.findall(r"`make ([a-z -]+)", text) for word in words.split()}
        assert named <= targets(), page


def test_ci_runs_the_pythons_that_are_promised():
    python = "Programming Language :: Python :: "
    promised = [c.removeprefix(python) for c in PROJECT["classifiers"] if c.startswith(python)]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"
    (oldest,) = (s["with"] for s in JOBS["oldest"]["steps"] if "setup-python" in s.get("uses", ""))
    assert oldest["python-version"] == promised[0]
