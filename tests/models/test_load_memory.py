"""What loading holds in memory while it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.models.families import FAMILIES
from lora_jax.models.llama.config import LlamaConfig
from tests.models.folders import (
    FIXTURES,
    copied,
    edit_config,
    shapes_of,
)

# Memory of the process's own, sampled: the pages of the mapped file are the system's to take back.
_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import jax
from lora_jax.models import load_model

def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0])

def sample():
    while not done.is_set():
        samples.append(own_memory())
        time.sleep(0.001)

folder, tiny, scan_layers = sys.argv[1], sys.argv[2], sys.argv[3] == "stacked"
load_model(tiny, tokenizer=False, scan_layers=scan_layers)  # what is loaded once for all
samples, done = [own_memory()], threading.Event()
thread = threading.Thread(target=sample)
thread.start()
model = load_model(folder, tokenizer=False, scan_layers=scan_layers)
jax.block_until_ready(model.params)
done.set()
thread.join()
copy = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"grown": max(samples) - samples[0], "copy": copy}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("form", ["apart", "stacked"])
def test_loading_takes_one_copy_and_one_tensor_in_passing(tmp_path, form):
    folder = copied("llama", tmp_path)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    edit_config(folder, **sizes, head_dim=256)
    small = LlamaConfig.from_json(json.loads((folder / "config.json").read_text()), "here")
    shapes, _ = shapes_of(small)
    family = FAMILIES["llama"]
    tensors = {}
    for entry in [*family.entries(small), *family.lm_head(small)]:
        shape = shapes[entry.path].shape
        tensors[entry.tensor] = np.ones(shape[::-1] if entry.is_transposed else shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    # Arrays that are let go go back to the system at once, not to a list of free pieces.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEASURE, str(folder), str(FIXTURES / "llama"), form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    largest = max(x.nbytes for x in tensors.values())
    assert measured["copy"] > 190e6 and largest < 17e6
    # A stack is there whole while a layer's tensor is turned, and small programs fill it; with one
    # more copy of a parameter it would be another 17 MB, or 50.
    most = {"apart": 4e6, "stacked": largest + 16e6}[form]
    assert measured["grown"] < measured["copy"] + largest + most, measured
