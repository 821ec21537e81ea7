"""Every method under JAX's global settings: the same adapter from the same file, the same bits on
resuming or a refusal that names the setting."""

import json
import os
import subprocess
import sys

import pytest

from lora_jax.methods.registry import METHODS
from lora_jax.settings import plain_config
from tests.train.conftest import ROOT

SAME_BITS = {
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}
SETTINGS = {**SAME_BITS, "JAX_ENABLE_X64": "1"}
OWN = {
    "intrinsic": {"method.dim": 40, "method.targets": ".*"},
    "uni_lora": {"method.dim": 40},
}


def run(*arguments, **settings):
    command = [sys.executable, "-m", "tests.train.run_grid", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        command, cwd=ROOT, env=environment | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def write_configs(make_config, path, names):
    configs = {}
    for name in names:
        config = make_config(
            {"method.name": name, "train.num_steps": 6, "train.eval_every_steps": 6}
        )
        configs[name] = plain_config(config.replace(OWN.get(name, {})))
    path.write_text(json.dumps(configs))
    return path


def check(found, setting):
    for name, of_method in found.items():
        assert of_method["lifted"] < 1e-4, name
        same, conditions = of_method["verified"]
        if setting in SAME_BITS:
            assert same, (name, conditions)
            assert of_method["resumed"] == of_method["whole"] == of_method["fresh"], name
            assert conditions == [], name
        else:
            # Trained again under it, the weights are others: the verdict names the setting.
            assert setting in of_method["refused"], name
            assert any(setting in condition for condition in conditions), name


@pytest.fixture(scope="module")
def begun(make_config, tmp_path_factory):
    """A function: the workdir and configs of these methods, trained in the default settings."""

    def begin(names):
        workdir = tmp_path_factory.mktemp("grid")
        configs = write_configs(make_config, workdir / "configs.json", names)
        run(workdir, configs, "begin")
        default = json.loads((workdir / "default.json").read_text())
        return workdir, configs, default

    return begin


def compare(begun_here, setting, value):
    workdir, configs, default = begun_here
    folder = workdir / setting
    run(workdir, configs, folder, **{setting: value})
    found = json.loads((folder / "found.json").read_text())
    check(found, setting)
    for name, of_method in found.items():
        # LoRA-XS and PiSSA decompose the base, which rounds in the same way too.
        assert of_method["merged"] == default[name]["merged"], name
        assert of_method["loss"] == pytest.approx(default[name]["loss"], abs=1e-5), name


@pytest.mark.slow
def test_two_methods_that_draw_again_do_so_in_the_same_way_under_rbg(begun):
    compare(begun(("vera", "uni_lora")), "JAX_DEFAULT_PRNG_IMPL", "rbg")


@pytest.fixture(scope="module")
def all_begun(begun):
    return begun(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_under_every_setting(all_begun, setting):
    compare(all_begun, setting, SETTINGS[setting])
