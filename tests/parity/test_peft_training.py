"""100 steps of LoRA here and in peft + torch: same model, adapters, batches and AdamW.

The fixture, and the settings repeated here, are make_peft_training_fixture.py's.
"""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.io.safetensors import read_tensors
from lora_jax.models import load_model

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
PATHS = {
    f"encoder/layers/{i}/attention/{name}/kernel": f"encoder.layer.{i}.attention.self.{name}"
    for i in range(2)
    for name in ("query", "value")
}


def trainable_from(tensors, moment: str):
    """peft's tensors at that moment ("initial", "final") as a trainable tree: (out, in) turned."""
    trainable = {
        path: {
            "a": tensors[f"{moment}.{module}.lora_A.weight"].T,
            "b": tensors[f"{moment}.{module}.lora_B.weight"].T,
        }
        for path, module in PATHS.items()
    }
    trainable["head/kernel"] = {"value": tensors[f"{moment}.head.weight"].T}
    trainable["head/bias"] = {"value": tensors[f"{moment}.head.bias"]}
    return trainable


@pytest.fixture(scope="module")
def tensors():
    return read_tensors(FIXTURES / "peft_training.safetensors")


@pytest.fixture(scope="module")
def run(tensors):
    """Returns (losses before each step, final trainable)."""
    model = load_model(FIXTURES / "bert_tiny", head="classification")
    method = lj.LoRA(targets=r".*/(query|value)/kernel", rank=4, alpha=8, train=model.head_pattern)
    drawn, frozen = method.init(jax.random.key(0), model.params)
    trainable = jax.tree.map(jax.numpy.asarray, trainable_from(tensors, "initial"))
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, trainable)
    apply = lj.lift(model.apply)
    optimizer = optax.adamw(1e-2, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)

    def loss(trainable, ids, mask, labels):
        logits = apply(method.bind(trainable, frozen), ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, batch):
        trainable, state = carry
        value, gradient = jax.value_and_grad(loss)(trainable, *batch)
        update, state = optimizer.update(gradient, state, trainable)
        return (optax.apply_updates(trainable, update), state), value

    names = ("input_ids", "attention_mask", "labels")
    batches = tuple(tensors[name].astype(np.int32) for name in names)
    carry = (trainable, optimizer.init(trainable))
    (trainable, _), losses = jax.jit(lambda c, b: jax.lax.scan(step, c, b))(carry, batches)
    return np.asarray(losses), trainable


def test_losses_follow_peft_for_100_steps(run, tensors):
    losses, _ = run
    assert losses.shape == (100,)
    np.testing.assert_allclose(losses, tensors["losses"], rtol=0, atol=1e-4)
    # The run learns something, so the agreement is not that of a model at rest.
    assert losses[-10:].mean() < losses[:10].mean() - 0.4


def test_final_adapters_and_head_equal_peft(run, tensors):
    _, trainable = run
    initial, final = trainable_from(tensors, "initial"), trainable_from(tensors, "final")
    for path, entry in final.items():
        for name, expected in entry.items():
            error = np.linalg.norm(np.asarray(trainable[path][name]) - expected)
            assert error <= 1e-3 * np.linalg.norm(expected), (path, name)
            moved = np.linalg.norm(expected - initial[path][name])
            assert moved > 0.05 * np.linalg.norm(expected), (path, name)
