"""Distinct prompts, their references, and answers as the training lays them out."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Examples, completion_examples
from lora_jax.generate import Decoding
from lora_jax.generate import generate_tokens as generate
from lora_jax.generate.score import Questions, answer, score
from lora_jax.models import load_model


def examples(prompts, completions):
    return completion_examples(prompts, completions, [str(n) for n in range(len(prompts))])


def test_every_prompt_stands_once_with_all_of_its_completions():
    questions = Questions.of(examples(["a", "b", "a", "c", "b", "a"], list("123456")))
    assert questions.prompts == ("a", "b", "c")
    assert questions.references == (("1", "3", "6"), ("2", "5"), ("4",))
    many = Questions.of(examples([str(n) for n in range(100)], ["x"] * 100), limit=4)
    assert many.prompts == ("0", "25", "50", "75")


def test_labels_are_no_references():
    labelled = Examples(texts=("a",), labels=np.zeros(1, np.int32), ids=("0",))
    with pytest.raises(RequestError, match="labels, not texts"):
        Questions.of(labelled)


def test_the_references_themselves_score_100():
    questions = Questions(
        ("a", "b"), (("the cat sat on a mat .", "x"), ("one two three four five",))
    )
    best = score(questions, [own[0] for own in questions.references])
    assert best["bleu"] == pytest.approx(100) and best["rouge_l"] == pytest.approx(100)


def test_a_prompt_is_ended_as_in_training():
    model = load_model("tiny-llama")
    settings = Decoding(6)
    texts = answer(model, model.params, ["ab", "xyz"], settings, batch_size=2)
    for text, prompt in zip(texts, ("ab", "xyz"), strict=True):
        ids = [*model.tokenizer.encode(prompt).ids, model.eos_token_id]
        found = generate(model, model.params, [ids], settings=settings)
        length = int(found.lengths[0])
        alone = model.tokenizer.decode(found.tokens[0][:length].tolist())
        assert text == alone.strip()
