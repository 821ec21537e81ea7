"""The public surface: what one dot from `lora_jax` reaches, and how it answers."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import lora_jax as lj
from lora_jax._public import EXTRA_OF, needs_extra

ROOT = Path(lj.__file__).resolve().parent.parent


def typed_names() -> dict[str, str]:
    """`{name: module}` of what `lora_jax/__init__.py` imports for type checkers."""
    tree = ast.parse((ROOT / "lora_jax" / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    found = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node.module for alias in node.names}
    found["generate"] = found.pop("generate_text")
    return found


def test_type_checkers_see_the_names_that_there_are_at_run_time():
    assert typed_names().keys() == set(lj.__all__)
    assert set(lj.__all__) <= set(dir(lj))
    for name, module in typed_names().items():
        found = getattr(lj, name)
        if name in ("train", "generate"):  # the packages, which are callable
            assert isinstance(found, types.ModuleType)
            function = getattr(
                importlib.import_module(module), {"generate": "generate_text"}.get(name, name)
            )
            assert inspect.signature(found) == inspect.signature(function)
        elif not isinstance(found, types.ModuleType):
            assert found is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    "name", ["generate", "predict", "sweep", "load_adapter", "save_adapter", "load_model"]
)
def test_public_functions_have_explicit_keywords_and_sections(name):
    function = getattr(lj, name)
    if isinstance(function, types.ModuleType):
        function = function.generate_text
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert "Args:" in inspect.getdoc(function) and "RequestError" in inspect.getdoc(function)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'swep'; nearest: 'sweep'"):
        lj.swep  # noqa: B018
    with pytest.raises(AttributeError, match="'lora_jax' has no attribute '__wrapped__'$"):
        lj.__wrapped__  # noqa: B018
    assert not hasattr(lj, "no such thing at all")


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("train", "load_adapter", "lora_jax.load_adapter"),
        ("generate", "generate", "lora_jax.generate.generate_tokens"),
    ],
)
def test_an_old_name_works_and_names_the_new_one(package, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};"):
        assert callable(getattr(getattr(lj, package), old))


BEFORE = ["", "lj.load_model; import lora_jax.io.safetensors", "import lora_jax.train.loop"]


@pytest.mark.parametrize("before", BEFORE)
def test_names_are_there_whatever_was_imported_before(before):
    names = ("peft.load_adapter", "analysis.subspace_similarity", "train", "generate")
    asked = "; ".join(f"assert callable(lj.{name})" for name in names)
    assert run(f"import lora_jax as lj\n{before}\n{asked}") == ""


def test_neither_the_import_nor_the_help_waits_for_jax():
    code = "import sys, lora_jax.cli.main as m; m.main(['--help']); sys.stdout = sys.stderr; "
    assert run(code + "assert 'jax' not in sys.modules and 'numpy' not in sys.modules")


def test_adapters_and_sweeps_need_no_extra():
    missing = ", ".join(f"{name}=None" for name in EXTRA_OF)
    code = f"""
import sys
sys.modules.update({missing})
import jax, jax.numpy as jnp, lora_jax as lj
base = {{"w": jnp.eye(4), "v": jnp.ones((4, 1))}}
loss = lambda p, batch: jnp.mean((jnp.tanh(batch @ p["w"]) @ p["v"] - 1.0) ** 2)
cells = [{{"targets": "w", "rank": 1, "lr": 1e-2}}]
found = lj.sweep(loss, base, [jnp.ones((8, 4))], cells, num_steps=1, progress=False)
assert not found[0].error, found[0].error
try:
    lj.load_model("tiny-bert")
except ModuleNotFoundError as error:
    from lora_jax._public import needs_extra
    print(needs_extra(error))
"""
    assert "pip install 'lora_jax[text]'" in run(code)


def test_every_extra_is_named_by_the_packages_that_it_brings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    plain = {name: name.replace("_", "-") for name in EXTRA_OF} | {
        "huggingface_hub": "huggingface_hub",
        "mlflow": "mlflow-skinny",
    }
    for name, extra in EXTRA_OF.items():
        brought = {line.partition(">=")[0] for line in extras[extra]}
        assert plain[name] in brought, f"{name} is not in the extra {extra}"
        assert not [line for line in project["dependencies"] if line.startswith(plain[name])]
    trackers = {"wandb", "trackio", "mlflow"}
    assert set(EXTRA_OF.values()) == {"text", "data", "report", "eval"} | trackers
    assert extras["trackers"][0] == "lora_jax[wandb,trackio,mlflow]"
    (everything,) = extras["all"]
    assert everything == "lora_jax[text,data,report,eval]"
    assert needs_extra(ModuleNotFoundError(name="something_else")) is None


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What README, notebooks and experiments may import beyond one dot, by file, and why.
ALLOWED = {
    # Benchmarks time and compare the parts themselves.
    "experiments/bench/": [
        "models",
        "plan.topology",
        "train.environment",
        "train.loss",
        "train.task",
    ],
    # It writes the table of settings into their README.
    "experiments/analysis/index.py": ["settings.described"],
    # Verdicts are computed from cards and intervals as the report reads them.
    "experiments/analysis/findings.py": ["core", "report", "train.environment"],
    "experiments/analysis/hypotheses.py": ["report", "train.task"],
    "experiments/analysis/evidence.py": ["report.statistics"],
    "experiments/analysis/pages.py": ["report.quantities"],
    "experiments/analysis/study.py": ["core.nearest", "report.runs"],
    "experiments/analysis/predictions.py": ["report.runs", "report.statistics", "train.task"],
    "experiments/analysis/forgetting.py": ["report.statistics"],
    # Where a run began is drawn again from its seed.
    "experiments/analysis/learned.py": ["report.runs", "train.build"],
    "experiments/analysis/subspace_ranks.py": ["report.runs"],
    # Errors of configs name the nearest preset, as those of the package do.
    "experiments/configs/paper/": ["core.nearest"],
    "experiments/configs/shared.py": ["core.nearest"],
    "experiments/recompute.py": ["core.nearest"],
    # Texts of a run are decoded in a loop of its own, with its data.
    "experiments/analysis/what_rank_e2e.py": ["generate.score", "train.evaluate_run", "train.task"],
    # It begins where a run of seed 0 begins.
    "experiments/zoo/": ["train.build"],
}


def sources():
    """`(path in the repository, Python code)` of README, notebooks and experiments."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    yield "README.md", "\n".join(blocks)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        yield f"notebooks/{path.name}", re.sub(r"^[%!].*$", "", code, flags=re.M)
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        yield str(path.relative_to(ROOT)), path.read_text()


def imports_of(code: str):
    """`(module, name)` of each import from the package, None for the module itself."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_jax":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name, None) for alias in node.names if alias.name.split(".")[0] == "lora_jax"
            )


def test_readme_notebooks_and_experiments_import_public_names():
    used = set()
    for place, code in sources():
        for module, name in imports_of(code):
            inner = module.partition(".")[2]
            allowed = [
                (start, own)
                for start, inners in ALLOWED.items()
                for own in inners
                if place.startswith(start) and (inner == own or inner.startswith(f"{own}."))
            ]
            is_public = inner in ("", *lj.__all__)
            assert is_public or allowed, f"{place} imports {name} from {module}: use a public name"
            if is_public and name is not None:
                package = importlib.import_module(module)
                assert name in getattr(package, "__all__", dir(package)), f"{place}: {name}"
            else:
                used |= set(allowed)
    assert used == {(start, own) for start, inners in ALLOWED.items() for own in inners}
