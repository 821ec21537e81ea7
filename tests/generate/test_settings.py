"""Each setting that is out of range, or would do nothing, is refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.generate import Decoding

BAD = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    "True tokens": ({"max_new_tokens": True}, "max_new_tokens=True"),
    "no beams": ({"num_beams": 0}, "num_beams=0"),
    "negative top_k": ({"do_sample": True, "top_k": -1}, "top_k=-1"),
    "top_p 0": ({"do_sample": True, "top_p": 0.0}, "top_p=0.0"),
    "top_p above 1": ({"do_sample": True, "top_p": 1.1}, "top_p=1.1"),
    "temperature 0": ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
    "no number": ({"do_sample": True, "temperature": float("nan")}, "temperature=nan"),
    "temperature as text": ({"do_sample": True, "temperature": "hot"}, "temperature='hot'"),
    "sampling by text": ({"do_sample": "yes"}, "do_sample='yes'"),
    "temperature alone": ({"temperature": 0.7}, "do_sample=True"),
    "top_p alone": ({"top_p": 0.7}, "do_sample=True"),
    "sampled beams": ({"do_sample": True, "num_beams": 2}, "num_beams=2"),
    "penalty alone": ({"length_penalty": 0.8}, "num_beams above 1"),
    "early alone": ({"early_stopping": True}, "num_beams above 1"),
    "wrong word": ({"num_beams": 2, "early_stopping": "always"}, "'always'"),
    "beyond float32": ({"num_beams": 2, "length_penalty": 50.0}, "length_penalty=50.0"),
    "below float32": ({"num_beams": 2, "length_penalty": -60.0}, "length_penalty=-60.0"),
    "prompt alone": ({"no_repeat_in_prompt": False}, "no_repeat_in_prompt=False does nothing"),
    "negative size": ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
    "ends as text": ({"eos_token_ids": "</s>"}, "eos_token_ids='</s>'"),
    "negative end": ({"eos_token_ids": (3, -1)}, "eos_token_ids=-1"),
    "negative padding": ({"pad_token_id": -1}, "pad_token_id=-1"),
    "greedy twice": ({"num_return": 2}, "num_return=2"),
    "more than beams": ({"num_beams": 2, "num_return": 3}, "num_beams=2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_setting_that_cannot_be_meant_is_refused_by_name(name):
    fields, words = BAD[name]
    with pytest.raises(RequestError) as refused:
        Decoding(**{"max_new_tokens": 8, **fields})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_ends_may_be_one_id_or_a_list_and_settings_are_values():
    one, many = Decoding(4, eos_token_ids=7), Decoding(4, eos_token_ids=[7, 7, 8])
    assert one.eos_token_ids == (7,) and many.eos_token_ids == (7, 8)
    assert hash(one) == hash(Decoding(4, eos_token_ids=(7,))) and one != many
    assert dataclasses.replace(one, max_new_tokens=5).eos_token_ids == (7,)


def test_scores_are_divided_by_length_to_the_penalty():
    divisors = Decoding(3, num_beams=2, length_penalty=0.8).divisors()
    np.testing.assert_array_equal(divisors, np.float32([1.0, 2.0**0.8, 3.0**0.8]))
