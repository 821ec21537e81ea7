"""The Python in the READMEs runs as it stands, top to bottom."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.registry import METHODS
from tests.core.adapted import random_like

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    """A front door of at most 150 lines; all else has a page of its own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1000
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert not [to for to in links if not to.startswith("https:") and not (ROOT / to).exists()]


def python_of(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readmes_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(python_of("README.md")), names)
    assert "trainable parameters" in capsys.readouterr().out
    np.testing.assert_array_equal(names["merged"]["w1"], names["params"]["w1"])  # b is zero
    results = names["results"]
    assert len(results) == 8 and not any(row.error for row in results)
    assert all(row.losses[-10:].mean() < row.losses[:10].mean() for row in results)


@pytest.fixture
def guide(register):
    """What the guide's blocks define, run top to bottom as one file; `register` forgets it."""
    names: dict = {"__name__": "guide"}
    exec("\n".join(python_of("lora_jax/methods/README.md")), names)
    return names


PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 8))}


def test_the_guides_variant_is_lora_xs(guide):
    """The same numbers as the class of this package."""
    of_guide, ours = (kind(targets="w", rank=3, alpha=6.0) for kind in (guide["LoRAXS"], lj.LoRAXS))
    (trainable, frozen), expected = (m.init(jax.random.key(1), PARAMS) for m in (of_guide, ours))
    for part, array in trainable["w"].items():
        assert np.array_equal(array, expected[0]["w"][part])
    moved = {"w": {**trainable["w"], "core": random_like(trainable["w"]["core"], 3)}}
    np.testing.assert_array_equal(
        of_guide.merge(moved, frozen)["w"], ours.merge(moved, frozen)["w"]
    )
    stored = lj.quantize(PARAMS, "w")
    assert set(of_guide.init(jax.random.key(1), stored)[0]["w"]) == {"a", "core", "b"}


def test_the_guides_gain_and_product_are_their_equations(guide):
    w = np.asarray(PARAMS["w"], np.float64)
    gained, ia3 = guide["Gained"](targets="w", rank=2, alpha=6.0), METHODS["ia3"](targets="w")
    for method, expected in (
        (gained, lambda p: w + 3.0 * p["gain"] * p["a"] @ p["b"]),
        (ia3, lambda p: w * p["gain"]),
    ):
        trainable, frozen = method.init(jax.random.key(1), PARAMS)
        np.testing.assert_array_equal(method.merge(trainable, frozen)["w"], PARAMS["w"])
        moved = random_like(trainable, 3)
        parts = {part: np.asarray(x, np.float64) for part, x in moved["w"].items()}
        merged = method.merge(moved, frozen)["w"]
        np.testing.assert_allclose(merged, expected(parts), rtol=1e-5, atol=1e-5)
        lifted = lj.lift(lambda p, x: x @ p["w"])(method.bind(moved, frozen), np.eye(6))
        np.testing.assert_allclose(lifted, merged, rtol=1e-5, atol=1e-5)
