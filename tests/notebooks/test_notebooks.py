"""The notebooks run from top to bottom on tiny models, and stand in the repository with figures."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    # Small enough for a code host to show.
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_smoke_mode(path, monkeypatch):
    """In this process: a kernel of its own would import and compile everything once more."""
    monkeypatch.setenv("LORA_JAX_SMOKE", "1")
    monkeypatch.chdir(path.parent)
    with plt.rc_context():
        plt.switch_backend("Agg")
        plt.close("all")
        names = {"__name__": "__main__"}
        for number, cell in enumerate(nbformat.read(path, 4).cells):
            if cell.cell_type == "code":
                run_cell(cell.source, f"{path.name}, cell {number}", names)
        assert plt.get_fignums()
        plt.close("all")


def run_cell(source, place, names):
    """Runs a cell as a kernel does: its last expression is shown."""
    body = ast.parse(source, place)
    last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, place, "exec"), names)
    if last is not None:
        repr(eval(compile(ast.Expression(last.value), place, "eval"), names))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_SMOKE", "1")
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    assert any(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
