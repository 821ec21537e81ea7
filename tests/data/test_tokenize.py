"""Encoding: truncation, special tokens, and the tokenizer left alone."""

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models

from lora_jax.core.errors import RequestError
from lora_jax.data import Examples, encode_examples
from lora_jax.data.tokenize import CHUNK_SIZE

from .conftest import WORDS

CLS, SEP, PAD = 1, 2, 3


def examples_of(texts):
    labels = np.arange(len(texts), dtype=np.int32) % 2
    return Examples(tuple(texts), labels, tuple(f"row {i}" for i in range(len(texts))))


word_lists = st.lists(st.lists(st.sampled_from(WORDS), max_size=12), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word_lists, st.integers(3, 16))
def test_encoding_is_the_words_between_special_tokens_cut_to_length(tokenizer, words, max_length):
    encoded = encode_examples(
        tokenizer, examples_of([" ".join(row) for row in words]), max_length=max_length
    )
    assert len(encoded) == len(words)
    for i, row in enumerate(words):
        expected = [CLS, *[4 + WORDS.index(word) for word in row][: max_length - 2], SEP]
        assert encoded.tokens(i).tolist() == expected
        assert encoded.lengths[i] == len(expected) <= max_length
    assert encoded.ids.dtype == np.int32
    assert encoded.offsets.dtype == np.int64
    assert encoded.labels.dtype == np.int32
    assert encoded.pad_id == PAD


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    tokenizer.enable_padding(length=7, pad_id=5)
    tokenizer.enable_truncation(4)
    before = tokenizer.to_str()
    encoded = encode_examples(tokenizer, examples_of(["a very dull film"]), max_length=6)
    assert tokenizer.to_str() == before
    assert encoded.lengths.tolist() == [6], "its own truncation and padding do not count"
    assert encoded.pad_id == 5


def test_progress_reaches_the_end_and_chunks_do_not_show(tokenizer):
    texts = ["a film", "very funny and sharp", "not"] * (CHUNK_SIZE // 2)
    reported = []
    encoded = encode_examples(
        tokenizer, examples_of(texts), max_length=8, on_progress=lambda *at: reported.append(at)
    )
    assert reported == [(CHUNK_SIZE, len(texts)), (len(texts), len(texts))]
    first = encode_examples(tokenizer, examples_of(texts[:3]), max_length=8)
    np.testing.assert_array_equal(encoded.ids, np.tile(first.ids, CHUNK_SIZE // 2))


def test_no_room_for_text_is_an_error(tokenizer):
    with pytest.raises(RequestError, match=r"data\.max_length=2 .*adds 2 special.*give 3"):
        encode_examples(tokenizer, examples_of(["a"]), max_length=2)


def test_a_text_without_tokens_is_an_error():
    bare = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(RequestError, match=r"row 1: .*no tokens in '  '"):
        encode_examples(bare, examples_of(["a", "  "]), max_length=4)
