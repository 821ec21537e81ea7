"""The architecture's arrows, held true: imports point only downwards, files stay readable."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lora_jax"
LAYERS = {
    "core": 0, "settings": 0,
    "io": 1, "quant": 1, "methods": 1,
    "models": 2,
    "peft": 3, "parallel": 3, "data": 3, "trackers": 3,
    "train": 4, "generate": 4, "analysis": 4,
    "sweeps": 5, "plan": 5, "serve": 5,
    "report": 6,
    "hub": 6,
    "cli": 7,
}  # fmt: skip
# Old names, for one release: they say where their names are now.
RENAMED = {"formats"}
FILES = sorted(PACKAGE.rglob("*.py"))


def folder_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "lora_jax" and len(parts) > 1 else None


def imports_of(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_only_downwards(file):
    parts = file.relative_to(PACKAGE).parts
    if len(parts) == 1:  # lora_jax/__init__.py and __main__.py stand above all
        return
    if parts[0] in RENAMED:
        return
    assert parts[0] in LAYERS, f"{parts[0]} has no layer: see lora_jax/README.md"
    for module in imports_of(file):
        target = folder_of(module)
        if target in LAYERS:
            assert LAYERS[target] <= LAYERS[parts[0]], f"{file} imports {module}, a layer above"


def circle_in(uses: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(uses).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_folder_imports_one_that_imports_it():
    """Imports under `TYPE_CHECKING` and within functions count, too."""
    uses: dict[str, set[str]] = {}
    for file in FILES:
        folder = file.relative_to(PACKAGE).parts[0]
        targets = {folder_of(module) for module in imports_of(file)} & LAYERS.keys()
        uses.setdefault(folder, set()).update(targets - {folder})
    assert not circle_in(uses)


def test_no_file_imports_one_that_imports_it():
    """Faces (`__init__.py`) hand on what their folder has, and do not count."""
    uses = {
        ".".join(("lora_jax", *file.relative_to(PACKAGE).with_suffix("").parts)): set(
            imports_of(file)
        )
        for file in FILES
        if file.name != "__init__.py"
    }
    assert not circle_in({file: targets & uses.keys() for file, targets in uses.items()})


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name == "core"], ids=lambda f: f.name
)
def test_the_core_is_pure_jax(file):
    allowed = {"jax", "numpy", "lora_jax", "__future__"}
    standard = {
        "collections", "contextlib", "dataclasses", "difflib", "functools", "hashlib", "math",
        "operator", "re", "threading", "typing", "warnings",
    }  # fmt: skip
    for module in imports_of(file):
        assert module.split(".")[0] in allowed | standard, f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_readable(file):
    assert len(file.read_text().splitlines()) <= 330, "split it, unless that would hide one idea"


def test_no_function_is_longer_than_70_lines_without_its_docstring():
    for file in (*FILES, *(PACKAGE.parent / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
                assert lines <= 70, f"{file}: {node.name} has {lines} lines"


def test_the_names_of_the_page_are_where_it_says_in_at_most_twelve():
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `(\w+)` \| `([\w/.]+)` \|", page, re.M)
    assert 5 < len(rows) <= 12
    for name, file in rows:
        assert re.search(rf"^(class|def) {name}\b", (PACKAGE / file).read_text(), re.M), name
