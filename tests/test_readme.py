"""The Python in the READMEs runs as it stands, top to bottom."""

import re
from pathlib import Path

import jax
import numpy as np

import lora_jax as lj
from tests.core.adapted import random_like

ROOT = Path(__file__).resolve().parents[1]


def python_of(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readmes_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes an adapter
    blocks = python_of("README.md")
    assert len(blocks) >= 4
    names: dict = {}
    exec("\n".join(blocks), names)
    said = capsys.readouterr().out
    assert "trainable parameters" in said and "layers/1/qkv[-1,0:8]" in said
    assert said.count("relative error") == 2
    results = names["results"]
    assert len(results) == 8 and not any(row.error for row in results)
    assert all(row.losses[-10:].mean() < row.losses[:10].mean() for row in results)


def test_the_guides_variant_is_lora_xs():
    """Under 60 lines, as the guide promises, and the same numbers as the class of this package."""
    (block,) = python_of("lora_jax/methods/README.md")
    assert len(block.splitlines()) < 60
    names: dict = {"__name__": "guide"}
    exec(block, names)
    params = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
    of_guide, ours = (kind(targets="w", rank=3, alpha=6.0) for kind in (names["LoRAXS"], lj.LoRAXS))
    (trainable, frozen), expected = (m.init(jax.random.key(1), params) for m in (of_guide, ours))
    for part, array in trainable["w"].items():
        assert np.array_equal(array, expected[0]["w"][part])
    moved = {"w": {**trainable["w"], "core": random_like(trainable["w"]["core"], 3)}}
    np.testing.assert_array_equal(
        of_guide.merge(moved, frozen)["w"], ours.merge(moved, frozen)["w"]
    )
    stored = lj.quantize(params, "w")
    assert set(of_guide.init(jax.random.key(1), stored)[0]["w"]) == {"a", "core", "b"}
