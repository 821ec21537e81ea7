"""Token for token what `transformers.generate` gives (fixtures by make_generate_fixtures.py).

No case hangs on a tie: the script refuses those that noise of 1e-5 on the logits changes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from generate_cases import CASES, EOS, MODELS, NUM_NEW, PAD

from lora_jax.generate import generate_tokens as generate
from lora_jax.io.safetensors import read_tensors
from lora_jax.models import load_model

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "generate"
# A program each to compile, seconds: those for all kinds of rules here, the others in `slow`. Cases
# that differ in data alone share one.
FAST = {
    "llama": (
        "greedy", "greedy, padded, one end", "greedy, no 2 twice",
        "10 beams, two ends, no 2 twice",
        *(name for name in CASES if name.startswith("4 beams") and len(CASES[name]) >= 3
          and CASES[name].get("eos") != "two" and "no_repeat_ngram_size" not in CASES[name]),
    ),
    "gpt2": (
        "greedy", "greedy, padded, one end", "4 beams, two ends", "4 beams, two ends, early",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return read_tensors(FOLDER / "generated.safetensors")


@pytest.fixture(scope="module")
def models():
    return {name: load_model(FOLDER / name, tokenizer=False) for name in MODELS}


def cases():
    for model in MODELS:
        for name in CASES:
            marks = () if name in FAST[model] else (pytest.mark.slow,)
            yield pytest.param(model, name, marks=marks, id=f"{model}, {name}")


@pytest.mark.parametrize(("name", "label"), list(cases()))
def test_tokens_equal_those_of_transformers(models, expected, name, label):
    settings = dict(CASES[label])
    is_padded = settings.pop("prompts") == "left"
    end = settings.pop("eos", None)
    mask = expected["attention_mask"] if is_padded else np.ones_like(expected["attention_mask"])
    found = generate(
        models[name],
        models[name].params,
        np.where(mask == 1, expected["input_ids"], PAD),
        mask,
        max_new_tokens=NUM_NEW,
        eos_token_ids=() if end is None else EOS[name][end],
        pad_token_id=PAD,
        **settings,
    )
    np.testing.assert_array_equal(found.tokens, expected[f"{name}, {label}"])
