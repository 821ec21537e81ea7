"""Pairs of prompt and completion: what is encoded, what is asked for, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from tokenizers import models, normalizers, pre_tokenizers, processors

from lora_jax.core.errors import RequestError
from lora_jax.data import (
    encode_completions,
    eval_batches,
    load_splits,
    prompt_ids,
    references_of,
    train_batches,
)
from lora_jax.data.completions import differs_from_first_format, special_prefix
from lora_jax.data.examples import completion_examples, limit_examples

EOS, PAD = 2, 3
LETTERS = {"a": 4, "dull": 5, "sharp": 6, "film": 7, "and": 8, "very": 9, "not": 10, "funny": 11}


def encode(tokenizer, pairs, max_length=20):
    prompts, completions = zip(*pairs, strict=True)
    examples = completion_examples(prompts, completions, [f"line {i}" for i in range(len(pairs))])
    return encode_completions(
        tokenizer, examples, max_length=max_length, eos_token_id=EOS, pad_token_id=PAD
    )


def test_pair_is_prompt_end_completion_end(tokenizer):
    found = encode(tokenizer, [("dull film", "not funny"), ("a", "very very sharp")])
    assert found.tokens(0).tolist() == [5, 7, EOS, 10, 11, EOS]
    assert found.tokens(1).tolist() == [4, EOS, 9, 9, 6, EOS]
    assert found.prompt_lengths.tolist() == [3, 2]
    assert prompt_ids(tokenizer, "dull film", eos_token_id=EOS) == [5, 7, EOS]


def test_long_prompt_loses_its_beginning_and_the_completion_nothing(tokenizer):
    found = encode(tokenizer, [("a dull film and a sharp film", "not funny")], max_length=6)
    assert found.tokens(0).tolist() == [6, 7, EOS, 10, 11, EOS]
    found = encode(tokenizer, [("a dull film", "not funny")], max_length=4)
    assert found.tokens(0).tolist() == [EOS, 10, 11, EOS]


def test_completion_that_does_not_fit_is_refused_by_its_place(tokenizer):
    with pytest.raises(RequestError, match=r"line 1: the completion has 3 tokens.*raise it to 5"):
        encode(tokenizer, [("a", "film"), ("a", "very very sharp")], max_length=4)


def test_batches_ask_for_completions_and_weigh_by_their_tokens(tokenizer):
    pairs = [("dull film", "not funny"), ("a", "sharp"), ("a", "film"), ("a a", "a very dull film")]
    data = encode(tokenizer, pairs)
    seen = {}
    for batch in eval_batches(data, batch_size=3, buckets=(4, 8)):
        for row, index in enumerate(batch["index"]):
            asked = batch["input_ids"][row][batch["loss_mask"][row] == 1].tolist()
            assert batch["weights"][row] == len(asked)
            if index >= 0:
                seen[int(index)] = asked
                assert batch["labels"][row] == data.labels[index]
    assert seen == {
        i: [LETTERS[word] for word in completion.split()] + [EOS]
        for i, (_, completion) in enumerate(pairs)
    }
    batch = next(train_batches(data, batch_size=4, buckets=(8,), seed=0))
    assert batch["weights"].sum() == 3 + 2 + 2 + 5


def test_fingerprint_tells_where_the_completion_begins(tokenizer):
    data = encode(tokenizer, [("dull film", "not funny")])
    later = dataclasses.replace(data, prompt_lengths=data.prompt_lengths + 1)
    one, two = (train_batches(x, batch_size=1, buckets=(8,), seed=0) for x in (data, later))
    first, second = next(one), next(two)
    np.testing.assert_array_equal(first["input_ids"], second["input_ids"])
    assert first["loss_mask"].sum() == second["loss_mask"].sum() + 1
    assert one.fingerprint != two.fingerprint


def data_config(**settings):
    plain = {"source": "jsonl", "path": "", "text": "prompt", "label": "completion", "limit": 0}
    return ConfigDict({**plain, **settings})


def test_own_pairs_of_a_file(write_jsonl):
    pairs = [(f"p{i % 20}", f" said {i} \n") for i in range(40)]
    path = write_jsonl("pairs.jsonl", pairs, columns=("prompt", "completion"))
    splits = load_splits(data_config(path=str(path)), target="text")
    assert splits.target == "text" and splits.label_names == ()
    found = {
        (prompt, completion)
        for part in (splits.train, splits.validation, splits.test)
        for prompt, completion in zip(part.texts, part.seconds, strict=True)
    }
    assert found == {(prompt, completion.strip()) for prompt, completion in pairs}
    # Equal prompts stay together, so none is in two splits.
    assert not set(splits.train.texts) & {*splits.validation.texts, *splits.test.texts}


def test_hash_is_that_of_both_texts(write_jsonl):
    def hash_of(pairs):
        path = write_jsonl("pairs.jsonl", pairs, columns=("prompt", "completion"))
        return load_splits(data_config(path=str(path)), target="text").data_hash

    pairs = [(f"p{i}", f"c{i}") for i in range(10)]
    assert hash_of(pairs) == hash_of(pairs)
    assert hash_of(pairs) != hash_of([*pairs[:-1], ("p9", "c")])


def test_limit_takes_pairs_whatever_their_prompts():
    examples = completion_examples(["a"] * 9 + ["b"], list("0123456789"), list("0123456789"))
    few, more = (limit_examples(examples, n, target="text") for n in (3, 6))
    assert len(few) == 3 and set(few.seconds) < set(more.seconds)
    assert list(few.seconds) == sorted(few.seconds)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": " "}, r":1: column 'completion' is empty"),
        ({"prompt": "a", "completion": 7}, r":1: column 'completion' holds 7, not a text"),
        ({"prompt": "a", "answer": "b"}, r":1: no column 'completion'.*set data.label"),
    ],
)
def test_bad_row_is_named(tmp_path, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RequestError, match=words):
        load_splits(data_config(path=str(path)), target="text")


def test_source_of_another_kind_is_refused():
    with pytest.raises(RequestError, match=r"tiny-pairs has completions.*set model.head=causal-lm"):
        load_splits(data_config(source="tiny-pairs"), target="class")


def test_tiny_pairs_are_three_disjoint_splits_of_two_references():
    splits = load_splits(data_config(source="tiny-pairs"), target="text")
    prompts = [set(part.texts) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in prompts] == [60, 10, 10]
    assert len(set.union(*prompts)) == 80
    assert {len(own) for own in references_of(splits.test).values()} == {2}


def sentencepiece_like(*, doubling: bool, bos: bool):
    """Ids: <s> 0, ▁ 1, </s> 2, ▁good 3, ▁film 4. As Llama's tokenizer.json, or as T5's."""
    vocabulary = [("<s>", 0.0), ("▁", -3.0), ("</s>", 0.0), ("▁good", -1.0), ("▁film", -1.0)]
    letters = [(letter, -5.0) for letter in "goodfilmax"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([*vocabulary, *dict(letters).items()], 0))
    if doubling:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return tokenizer


@pytest.mark.parametrize("doubling", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_bos_begins_the_prompt_unscored_and_no_spare_space_is_scored(doubling, bos):
    tokenizer = sentencepiece_like(doubling=doubling, bos=bos)
    found = encode(tokenizer, [("film", "good")])
    begin = [0] if bos else []
    assert found.tokens(0).tolist() == [*begin, 4, EOS, 3, EOS]
    assert found.prompt_lengths.tolist() == [len(begin) + 2]
    assert prompt_ids(tokenizer, "film", eos_token_id=EOS) == [*begin, 4, EOS]
    assert prompt_ids(tokenizer, "film", eos_token_id=EOS)[:-1] == tokenizer.encode("film").ids
    assert differs_from_first_format(tokenizer) == (bos or doubling)


def test_long_prompt_keeps_bos():
    tokenizer = sentencepiece_like(doubling=True, bos=True)
    found = encode(tokenizer, [("good good film", "good")], max_length=5)
    assert found.tokens(0).tolist() == [0, 4, EOS, 3, EOS]
    with pytest.raises(RequestError, match=r"the completion has 1 token.*raise it to 4"):
        encode(tokenizer, [("film", "good")], max_length=3)


def test_special_tokens_after_a_text_are_no_prefix():
    tokenizer = sentencepiece_like(doubling=False, bos=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    assert special_prefix(tokenizer) == [0]
