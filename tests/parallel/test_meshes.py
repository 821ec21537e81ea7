"""The same training on every mesh, and the bytes that each device holds."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core import trees
from lora_jax.models import load_model, save_model
from lora_jax.models.shapes import abstract_model
from lora_jax.parallel import Placement, make_mesh, read_mesh
from lora_jax.settings import OptimizerSettings
from lora_jax.train.loss import make_loss
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.state import init_state
from lora_jax.train.step import step_function
from lora_jax.train.task import CLASSIFICATION, TASKS, readout_tokens

SETTINGS = OptimizerSettings(lr=1e-3, schedule="constant")
MESHES = ("data=2,fsdp=2,tensor=2", "fsdp=8", "tensor=2,fsdp=4")
NUM_STEPS = 20


def setting(name, kind, *, quantize=False, wide=False):
    options = {"quantize": "nf4"} if quantize else {}
    if wide:
        name = wide_llama()
    if name == "tiny-bert":
        options |= {"head": "classification", "num_labels": 3}
    else:
        options |= {"scan_layers": True, "tokenizer": not wide}
    model = load_model(name, **options)
    if kind == "full":
        method = lj.FullFineTuning()
    else:
        method = lj.LoRA(
            targets="all-linear", rank=4, alpha=8, axes=model.axes, aliases=model.aliases,
            train="head/.*" if name == "tiny-bert" else (),
        )  # fmt: skip
    rng = np.random.default_rng(0)
    batches = [
        {
            "input_ids": rng.integers(3, 100, (8, 10)).astype(np.int32),
            "attention_mask": np.ones((8, 10), np.int32),
            "labels": rng.integers(0, 3, 8).astype(np.int32),
            "loss_mask": rng.integers(0, 2, (8, 10)).astype(np.int32),
            "weights": rng.uniform(0.5, 2, 8).astype(np.float32),
        }
        for _ in range(NUM_STEPS)
    ]
    task = CLASSIFICATION
    if name != "tiny-bert":
        task = dataclasses.replace(TASKS["causal-lm"], readout=readout_tokens)
    return model, method, task, batches


def losses_on(mesh, model, method, task, batches):
    """Losses step by step, and the last state; on no mesh at all where `mesh` is ""."""
    tx = make_optimizer(SETTINGS, NUM_STEPS)
    trainable, frozen = method.init(jax.random.key(0), model.params)
    state = init_state(trainable, tx, jax.random.key(1))
    if not mesh:
        step = jax.jit(step_function(make_loss(model.apply, method, task=task), tx))
        losses = []
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        return losses, state
    sizes = read_mesh(mesh)
    count = int(np.prod(list(sizes.values())))
    placement = Placement(make_mesh(sizes, jax.devices()[:count]), model)
    loss = make_loss(model.apply, method, task=task, constrain=placement.constrain)
    of_state = placement.state(method, state)
    state = jax.device_put(state, of_state)
    frozen = jax.device_put(frozen, placement.params(frozen))
    step = jax.jit(
        step_function(loss, tx), donate_argnums=0, out_shardings=(of_state, placement.replicated)
    )
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, jax.device_put(batch, placement.batch(batch)))
        losses.append(float(metrics["loss"]))
    return losses, state


@functools.cache
def wide_llama():
    """A folder of a random Llama whose kernels hold whole blocks of four bits on every device."""
    folder = Path(tempfile.mkdtemp()) / "wide"
    small = load_model("tiny-llama", tokenizer=False)
    config = dataclasses.replace(
        small.config, hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    shapes = abstract_model(config).params
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(
        lambda x: (
            jnp.ones(x.shape) if x.ndim == 1 else 0.06 * jax.random.normal(next(keys), x.shape)
        ),
        shapes,
    )
    model = dataclasses.replace(small, config=config, params=params)
    save_model(folder, model, params)
    return folder


def four_bits_per_device(mesh, model):
    """The share of all codes that the fullest device holds."""
    sizes = read_mesh(mesh)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    placement = Placement(make_mesh(sizes, devices), model)
    placed = jax.device_put(model.params, placement.params(model.params))
    leaves = [x for x in trees.flatten(placed).leaves if isinstance(x, lj.quant.NF4Weight)]
    held = [sum(s.data.size for s in x.kernel.addressable_shards if s.device == devices[0])
            for x in leaves]  # fmt: skip
    return sum(held) / sum(x.kernel.size for x in leaves)


CASES = [
    ("wide", "lora", True),
    ("tiny-llama", "lora", False),
    ("tiny-llama", "full", False),
    ("tiny-llama", "lora", True),
    ("tiny-gpt2", "lora", False),
    ("tiny-bert", "lora", False),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, quantize", CASES)
def test_meshes_give_the_losses_of_one_device(name, kind, quantize):
    """The whole grid; `test_mesh_runs.py` has a run of the trainer's in the fast suite."""
    wide = name == "wide"
    model, method, task, batches = setting(name, kind, quantize=quantize, wide=wide)
    expected, final = losses_on("", model, method, task, batches)
    for mesh in MESHES:
        found, state = losses_on(mesh, model, method, task, batches)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
        assert split, "no moment and no adapter is split"
        if wide:
            assert four_bits_per_device(mesh, model) < 0.6
    assert abs(expected[-1] - expected[0]) > 1e-3
    assert final.step == NUM_STEPS
