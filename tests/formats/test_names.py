"""`lj.formats.peft` and its like are there however the package was come by."""

import subprocess
import sys

import pytest

BEFORE = ["", "lj.load_model; import lora_jax.formats.safetensors", "lj.load_model('tiny-bert')"]


@pytest.mark.parametrize("before", BEFORE)
def test_names_of_the_contract_are_there_whatever_was_imported_before(before):
    names = ("formats.peft.load_adapter", "analysis.subspace_similarity", "load_model", "sweep")
    asked = "; ".join(f"assert callable(lj.{name})" for name in names)
    code = f"import lora_jax as lj\n{before}\n{asked}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
