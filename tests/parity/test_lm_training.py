"""100 steps of LoRA on completions here and in peft + torch: a tiny Llama and a tiny GPT-2.

The fixture, and the settings repeated here, are make_lm_training_fixtures.py's.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.io.safetensors import read_tensors, write_tensors
from lora_jax.peft.load import load_adapter, save_adapter
from lora_jax.train.loss import make_loss
from lora_jax.train.state import init_state
from lora_jax.train.step import step_function
from lora_jax.train.task import TASKS

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SETTINGS = {
    "llama": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "gpt2": {"target_modules": ["c_attn"], "r": 4, "lora_alpha": 16},
}
RATES = {"llama": 1e-2, "gpt2": 3e-3}


@pytest.fixture(scope="module")
def tensors():
    return read_tensors(FIXTURES / "lm_training.safetensors")


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_adapters_follow_peft_for_100_steps(name, tensors, tmp_path):
    def of(moment):
        start = f"{name}/{moment}/"
        return {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}

    # The start comes as peft would store it, and the end is written as peft would read it.
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **SETTINGS[name]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "adapter_model.safetensors", of("initial"))
    model = lj.load_model(FIXTURES / "peft" / "bases" / name, tokenizer=False)
    method, trainable = load_adapter(tmp_path, model)
    loss = make_loss(model.apply, method, task=TASKS["causal-lm"])
    tx = optax.adamw(RATES[name], b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    step = step_function(loss, tx)
    batches = {k: tensors[k].astype(np.int32) for k in ("input_ids", "attention_mask", "loss_mask")}
    batches["weights"] = batches["loss_mask"].sum(-1).astype(np.float32)

    @jax.jit
    def run(state, batches):
        return jax.lax.scan(lambda s, batch: step(s, model.params, batch), state, batches)

    state, metrics = run(init_state(trainable, tx, jax.random.key(0)), batches)
    losses = np.asarray(metrics["loss"])
    np.testing.assert_allclose(losses, tensors[f"{name}/losses"], rtol=0, atol=1e-4)
    # The run learns something, so the agreement is not that of a model at rest.
    assert losses[-10:].mean() < losses[:10].mean() - 0.4
    save_adapter(tmp_path / "final", method, state.trainable, model)
    found = read_tensors(tmp_path / "final" / "adapter_model.safetensors")
    initial, final = of("initial"), of("final")
    assert found.keys() == final.keys()
    for key, expected in final.items():
        error = np.linalg.norm(found[key] - expected)
        assert error <= 1e-3 * np.linalg.norm(expected), key
        assert np.linalg.norm(expected - initial[key]) > 0.05 * np.linalg.norm(expected), key
