"""Texts in, texts out."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.generate import (
    Decoding,
    Generated,
    chat_prompt,
    decode_texts,
    encode_prompts,
    generate_text,
    generate_tokens,
)
from lora_jax.models import load_model

SETTINGS = Decoding(6, do_sample=True, temperature=0.9, num_return=2)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-llama")


def test_a_prompt_is_answered_the_same_in_any_batch(model):
    prompts = ["a film", "b", "the acting is", "music", "end"]
    key = jax.random.key(0)
    seen = []
    found = {
        size: generate_text(
            model, model.params, prompts, SETTINGS, key=key, batch_size=size, show=seen.append
        )
        for size in (2, 5)
    }
    assert len(found[2]) == 10 and found[2] == found[5]
    assert seen == [2, 4, 5, 5]
    ids, mask = encode_prompts(model, prompts)
    whole = generate_tokens(model, model.params, ids, mask, SETTINGS, key=key)
    assert found[5] == decode_texts(model, whole)
    assert len(set(found[5])) == 10


def test_prompts_are_padded_on_the_left(model):
    ids, mask = encode_prompts(model, ["abc", "a"])
    own = model.tokenizer.encode("abc").ids
    assert ids[0].tolist() == own and mask[0].tolist() == [1, 1, 1]
    assert ids[1].tolist() == [256, 256, own[0]] and mask[1].tolist() == [0, 0, 1]


def test_texts_end_before_padding_and_special_tokens(model):
    letters = model.tokenizer.encode("abc").ids
    tokens = np.array([[*letters, 256, 256], [*letters, *letters[:2]]])
    found = Generated(tokens, np.array([4, 2]), np.zeros(2))
    assert decode_texts(model, found) == ["abc", "ab"]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "at least one text"),
        ("one text", "give a list"),
        (["a", ""], "prompt 1 is ''"),
        (["a", None], "prompt 1 is None"),
    ],
)
def test_a_prompt_that_is_none_is_refused_by_number(model, prompts, words):
    with pytest.raises(RequestError, match=words):
        generate_text(model, model.params, prompts, SETTINGS)


def test_batches_have_a_size_and_models_a_tokenizer(model):
    with pytest.raises(RequestError, match="batch_size=0"):
        generate_text(model, model.params, ["a"], SETTINGS, batch_size=0)
    bare = load_model("tiny-llama", tokenizer=False)
    if bare.stored_tokenizer is None:
        with pytest.raises(RequestError, match="without a tokenizer"):
            generate_text(bare, bare.params, ["a"], SETTINGS)


def test_only_a_model_that_knows_chats_is_asked_in_one(model):
    with pytest.raises(RequestError, match="lacks '<|im_start|>'".replace("|", r"\|")):
        chat_prompt(model, "hello")
    knowing = load_model("tiny-llama")
    knowing.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    prompt = chat_prompt(knowing, "hello")
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert knowing.tokenizer.encode(prompt).tokens[0] == "<|im_start|>"
