"""Model folders of the fixtures, copied, edited, loaded."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from lora_jax.models import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.functional import flatten, functional

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "families"
IDS = np.array([[5, 17, 30, 3, 9, 41], [7, 60, 5, 7, 3, 11]])


def copied(name, tmp_path):
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def load(folder, **options):
    return load_model(folder, tokenizer=False, **options)


def logits_of(model, **inputs):
    return np.asarray(jax.jit(model.apply)(model.params, IDS, **inputs))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edited = edit(tensors)
    save_file(tensors if edited is None else edited, folder / "model.safetensors")


def assert_same_params(one, other):
    one, other = flatten(one.params), flatten(other.params)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def shapes_of(config, **options):
    family = next(f for f in FAMILIES.values() if f.config is type(config))
    return functional(lambda: family.module(config, **options, rngs=nnx.Rngs(0)))
