"""`lora-jax analyze` on files of kohya's scripts and on many adapters at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.cli.main import main


@pytest.fixture
def files(tmp_path):
    """Five files in the layout of kohya's scripts; the fourth lacks a module."""
    rng = np.random.default_rng(0)
    paths = []
    for n in range(5):
        tensors = {}
        for module in ("lora_unet_blocks_0_to_q", "lora_unet_blocks_1_to_q")[: 1 + (n != 3)]:
            tensors[f"{module}.lora_down.weight"] = rng.normal(size=(4, 20)).astype(np.float32)
            tensors[f"{module}.lora_up.weight"] = rng.normal(size=(24, 4)).astype(np.float32)
            tensors[f"{module}.alpha"] = np.array(2.0, np.float32)
        paths.append(tmp_path / f"style-{n}.safetensors")
        save_file(tensors, paths[-1])
    return list(map(str, paths))


def test_a_file_of_kohyas_scripts_is_an_adapter(files, tmp_path, capsys):
    assert main(["analyze", files[0], f"--out={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapters"]["style-0.safetensors"]
    assert [(one["rank"], one["shape"]) for one in found] == [(4, [20, 24])] * 2
    assert main(["analyze", files[0], f"--out={tmp_path}"]) == 0
    assert "lora_unet_blocks_*_to_q" in capsys.readouterr().out.replace("\n", "")
    assert main(["analyze", files[0], "--base=x", f"--out={tmp_path / 'y.html'}"]) == 2
    error = capsys.readouterr().err
    assert "does not name modules as a base's tensors do" in error and error.count("\n") == 1


def test_many_adapters_have_one_map_a_line_per_pair_and_a_sentence(files, tmp_path, capsys):
    assert main(["analyze", *files, f"--out={tmp_path}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "10 pairs: the first directions" in out and out.count("Most alike") == 1
    assert "Of 10 pairs 4 do not change the same matrices" in out
    page = (tmp_path / "analysis.html").read_text()
    assert page.count("<svg") == 2 and 'id="figure-overview"' in page  # and the spectra
    assert page.count(" and style-") == 10 + out.count("and style-")
    assert main(["analyze", *files, f"--out={tmp_path}", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert len(pairs) == 10 and sum(len(pair["matrices"]) for pair in pairs) == 16


def test_three_adapters_have_all_figures(files, tmp_path, capsys):
    assert main(["analyze", *files[:3], f"--out={tmp_path}"]) == 0
    assert (tmp_path / "analysis.html").read_text().count("<svg") == 1 + 3 * 2
