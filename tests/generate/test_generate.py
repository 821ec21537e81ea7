"""Properties of `generate`, whose oracles run the model over the whole text without any padding.

That the tokens are transformers' own is shown in `tests/parity/test_generate_parity.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.generate import Decoding, compile_first
from lora_jax.generate import generate_tokens as generate
from lora_jax.generate.program import decode
from lora_jax.models import load_model

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "generate"
NUM_NEW = 8
SAMPLED = {"do_sample": True, "max_new_tokens": NUM_NEW, "temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def llama():
    return load_model("tiny-llama")


@pytest.fixture(scope="module")
def gpt2():
    return load_model(FIXTURES / "gpt2", tokenizer=False)


def prompts(lengths, *, width=None, seed=0, vocabulary=97):
    """Tokens padded on the left to `width`; a row's tokens depend on its length and `seed` only."""
    width = max(lengths) if width is None else width
    ids = np.full((len(lengths), width), 5, np.int32)
    mask = np.zeros((len(lengths), width), np.int32)
    for row, length in enumerate(lengths):
        own = np.random.default_rng((seed, length)).integers(0, vocabulary, length)
        ids[row, width - length :] = own
        mask[row, width - length :] = 1
    return ids, mask


def next_log_probs(model, params, text):
    """(T, V): of the token after each of `text`, by one plain pass in float32."""
    logits = jax.jit(model.apply)(params, np.array([text], np.int32))
    return np.asarray(jax.nn.log_softmax(logits[0]))


def check_greedy(model, params, ids, mask, found, eos):
    for row in range(len(ids)):
        length = int(found.lengths[row])
        new = found.tokens[row].tolist()
        prompt = ids[row][mask[row] == 1].tolist()
        # One width for all rows, so that the oracle is compiled once; what follows is not seen.
        width = ids.shape[1] + found.tokens.shape[1]
        text = (prompt + new[:length] + [0] * width)[:width]
        log_probs = next_log_probs(model, params, text)[len(prompt) - 1 :][:length]
        assert new[:length] == log_probs.argmax(axis=1).tolist()
        total = log_probs[np.arange(length), new[:length]].sum()
        np.testing.assert_allclose(found.log_probs[row], total, rtol=0, atol=1e-4)
        assert length == len(new) or new[length - 1] in eos
        assert not set(new[: length - 1]) & set(eos)
        assert set(new[length:]) <= {9}


def test_greedy_takes_the_most_probable_token_and_stops_at_the_end(llama):
    ids, mask = prompts([5, 2, 7])
    settings = {"max_new_tokens": NUM_NEW, "pad_token_id": 9}
    free = generate(llama, llama.params, ids, mask, eos_token_ids=(), **settings)
    check_greedy(llama, llama.params, ids, mask, free, eos=())
    eos = (int(free.tokens[0, 3]),)
    found = generate(llama, llama.params, ids, mask, eos_token_ids=eos, **settings)
    check_greedy(llama, llama.params, ids, mask, found, eos=eos)
    assert int(found.lengths[0]) <= 4 and int(found.lengths.max()) > 4


def test_the_last_position_of_a_model_is_used(gpt2):
    # 32 positions: there is no room for padding the prompt to a bucket.
    ids, mask = prompts([10, 3])
    found = generate(gpt2, gpt2.params, ids, mask, max_new_tokens=22, pad_token_id=9)
    check_greedy(gpt2, gpt2.params, ids, mask, found, eos=())
    with pytest.raises(RequestError, match="10 tokens and max_new_tokens=23 need 33 positions"):
        generate(gpt2, gpt2.params, ids, mask, max_new_tokens=23)


def test_what_the_prompt_says_may_be_said_where_only_new_tokens_count(llama):
    # A prompt that says nearly every token: where it counts, few are left to be said.
    ids = np.random.default_rng(0).permutation(240)[None].astype(np.int32)
    mask = np.ones_like(ids)
    settings = {"max_new_tokens": NUM_NEW, "no_repeat_ngram_size": 1}
    found = generate(llama, llama.params, ids, mask, no_repeat_in_prompt=False, **settings)
    for row in range(len(ids)):
        text = ids[row][mask[row] == 1].tolist()
        start = len(text)
        for _ in range(int(found.lengths[row])):
            padded = text + [0] * (ids.shape[1] + NUM_NEW - len(text))
            scores = next_log_probs(llama, llama.params, padded)[len(text) - 1].copy()
            scores[text[start:]] = -np.inf
            text.append(int(scores.argmax()))
        assert found.tokens[row, : len(text) - start].tolist() == text[start:]
    counted = generate(llama, llama.params, ids, mask, **settings)
    assert not np.isin(counted.tokens, ids).any() and np.isin(found.tokens, ids).any()


CACHED = {
    "sampled": ("llama", SAMPLED),
    "beams": ("gpt2", {"max_new_tokens": 6, "num_beams": 3, "no_repeat_ngram_size": 2}),
}


def cache_equals_recomputing(model, settings):
    ids, mask = prompts([5, 1, 7])
    key = jax.random.key(3)
    with_cache, without = (
        generate(model, model.params, ids, mask, key=key, use_cache=use, **settings)
        for use in (True, False)
    )
    np.testing.assert_array_equal(with_cache.tokens, without.tokens)
    np.testing.assert_array_equal(with_cache.lengths, without.lengths)
    np.testing.assert_allclose(with_cache.log_probs, without.log_probs, rtol=0, atol=1e-4)


# That beams move their cache rightly is fast to see in the parity tests.
@pytest.mark.parametrize("name", ["sampled", pytest.param("beams", marks=pytest.mark.slow)])
def test_a_cache_changes_nothing_but_the_time(name, request):
    model, settings = CACHED[name]
    cache_equals_recomputing(request.getfixturevalue(model), settings)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_a_cache_of_stacked_layers_changes_nothing_either(beams):
    model = load_model(FIXTURES / "llama", tokenizer=False, scan_layers=True)
    settings = {"max_new_tokens": 6, "num_beams": beams}
    cache_equals_recomputing(model, settings)
    plain = load_model(FIXTURES / "llama", tokenizer=False)
    ids, mask = prompts([5, 1, 7])
    both = [generate(m, m.params, ids, mask, **settings).tokens for m in (model, plain)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    "key", [None, 3, np.zeros(2, np.uint32), jax.random.split(jax.random.key(0))]
)
def test_what_is_no_key_is_named(llama, key):
    ids, mask = prompts([3])
    with pytest.raises(RequestError, match="needs a key to draw with: key=jax.random.key"):
        generate(llama, llama.params, ids, mask, key=key, **SAMPLED)


def test_a_row_draws_the_same_text_whatever_is_beside_and_before_it(llama):
    key = jax.random.key(1)
    ids, mask = prompts([5, 2, 7])
    found = generate(llama, llama.params, ids, mask, key=key, **SAMPLED)
    assert len({tuple(row) for row in found.tokens.tolist()}) == 3
    ids, mask = prompts([12, 2, 9], width=14)
    other = generate(llama, llama.params, ids, mask, key=key, **SAMPLED)
    np.testing.assert_array_equal(found.tokens[1], other.tokens[1])
    assert not np.array_equal(found.tokens[0], other.tokens[0])
    # The row's number is what counts, not its place; another key draws another text.
    moved = generate(
        llama, llama.params, ids[[1, 0, 2]], mask[[1, 0, 2]], key=key, row_numbers=[1, 0, 2],
        **SAMPLED,
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens[1], moved.tokens[0])
    last = generate(llama, llama.params, ids, mask, key=jax.random.key(2), **SAMPLED)
    assert not np.array_equal(found.tokens[1], last.tokens[1])


def adapters(model, number):
    """`(method, [trainable, …])`, random in both factors."""
    method = lj.LoRA(targets="q,v", rank=2, alpha=8, axes=model.axes, aliases=model.aliases)
    trainable, _ = method.init(jax.random.key(0), model.params)
    leaves, treedef = jax.tree.flatten(trainable)
    drawn = []
    for n in range(number):
        keys = jax.random.split(jax.random.key(n), len(leaves))
        new = [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        drawn.append(jax.tree.unflatten(treedef, new))
    return method, drawn


def test_another_adapter_prompt_or_temperature_compiles_nothing(llama, caplog):
    method, (first, second) = adapters(llama, 2)
    key = jax.random.key(0)
    ids, mask = prompts([5, 2, 7])
    bound = method.bind(first, llama.params)
    a = generate(llama, bound, ids, mask, key=key, **SAMPLED)
    programs = decode._cache_size()
    longer = prompts([16, 2, 1])
    changes = [
        (second, (ids, mask), {}),
        (second, longer, {"temperature": 1.4, "top_p": 0.5}),
        (first, longer, {"top_k": 3, "eos_token_ids": (7,), "pad_token_id": 3}),
    ]
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        texts = [
            generate(llama, method.bind(one, llama.params), *given, key=key, **(SAMPLED | more))
            for one, given, more in changes
        ]
    jax.block_until_ready(texts)
    compiled = [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
    assert not compiled and decode._cache_size() == programs
    assert not np.array_equal(a.tokens, texts[0].tokens)
    # The adapter is what makes the difference, and merging it makes none.
    merged = method.merge(first, llama.params)
    same = generate(llama, merged, ids, mask, key=key, **SAMPLED)
    np.testing.assert_array_equal(a.tokens, same.tokens)
    base = generate(llama, llama.params, ids, mask, key=key, **SAMPLED)
    assert not np.array_equal(a.tokens, base.tokens)
    assert decode._cache_size() <= programs + 1


def test_as_many_beams_as_tokens_find_the_best_text_of_all():
    model = load_model(FIXTURES / "llama", tokenizer=False)
    vocabulary, prompt, penalty = 97, [31, 4, 16, 23], 0.7
    first = next_log_probs(model, model.params, prompt)[-1]
    texts = np.array([[*prompt, token] for token in range(vocabulary)], np.int32)
    second = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(model.params, texts)[:, -1]))
    end = int(np.argsort(first)[-2])
    scores = (first[:, None] + second) / 2**penalty
    scores[end] = -np.inf
    best = {tuple(np.unravel_index(scores.argmax(), scores.shape)): scores.max()}
    best[(end, 9)] = first[end]
    wanted = sorted(best, key=best.get)[::-1]
    found = generate(
        model, model.params, [prompt], max_new_tokens=2, num_beams=vocabulary, num_return=2,
        length_penalty=penalty, eos_token_ids=(end,), pad_token_id=9,
    )  # fmt: skip
    assert tuple(found.tokens[0].tolist()) == wanted[0]
    divided = np.asarray(found.log_probs) / np.asarray(found.lengths) ** penalty
    np.testing.assert_allclose(divided[0], best[wanted[0]], rtol=0, atol=1e-5)
    everything = np.sort([*scores.ravel(), first[end]])[::-1]
    np.testing.assert_allclose(divided, everything[:2], rtol=0, atol=1e-5)


def test_compiling_first_leaves_nothing_to_compile(llama):
    ids, mask = prompts([5, 2, 7])
    settings = Decoding(NUM_NEW, eos_token_ids=())
    assert compile_first(llama, llama.params, ids, mask, settings) > 0
    programs = decode._cache_size()
    generate(llama, llama.params, ids, mask, settings)
    assert decode._cache_size() == programs


ONES = np.ones((1, 3), int)
REFUSED = {
    "no length": ({"max_new_tokens": None}, "give max_new_tokens"),
    "floats": ({"input_ids": [[1.0, 2.0]]}, "float64 (1, 2)"),
    "one axis": ({"input_ids": [1, 2]}, "(2,)"),
    "no tokens": ({"input_ids": np.zeros((1, 0), int)}, "(1, 0)"),
    "no rows": ({"input_ids": np.zeros((0, 3), int)}, "(0, 3)"),
    "other mask": ({"attention_mask": [[1, 1]]}, "attention_mask has shape (1, 2)"),
    "all padding": ({"attention_mask": 0 * ONES}, "row 0 is all padding"),
    "padded on the right": ({"attention_mask": [[1, 1, 0]]}, "pad on the left"),
    "a hole": ({"attention_mask": [[1, 0, 1]]}, "pad on the left"),
    "no mask": ({"attention_mask": [[2, 2, 2]]}, "0 for padding"),
    "another vocabulary": ({"input_ids": [[1, 257, 3]]}, "token id 257"),
    "negative id": ({"input_ids": [[1, -2, 3]]}, "token id -2"),
    "foreign end": ({"eos_token_ids": (300,)}, "eos_token_ids: 300"),
    "foreign padding": ({"pad_token_id": 300}, "pad_token_id: 300"),
    "no key": ({"do_sample": True}, "key=jax.random.key(0)"),
    "row numbers": ({"row_numbers": [1, 2]}, "there are 1 rows"),
    "both": ({"settings": Decoding(3)}, "max_new_tokens given with settings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_met_says_what_and_how(llama, name):
    fields, words = REFUSED[name]
    given = {"input_ids": [[1, 2, 3]], "max_new_tokens": 4, **fields}
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(RequestError) as refused:
        generate(llama, llama.params, **given)
    assert words in str(refused.value)


def test_only_a_language_model_generates_and_only_without_dropout(llama):
    for model in (load_model("tiny-bert"), load_model("tiny-gpt2", head="regression")):
        with pytest.raises(RequestError, match="is no language model"):
            generate(model, model.params, [[1, 2]], max_new_tokens=2)
    method = lj.LoRA(
        targets="q", rank=1, alpha=1, dropout=0.1, axes=llama.axes, aliases=llama.aliases
    )
    trainable, frozen = method.init(jax.random.key(0), llama.params)
    bound = method.bind(trainable, frozen, key=jax.random.key(1))
    with pytest.raises(RequestError, match="dropout is on at"):
        generate(llama, bound, jnp.ones((1, 2), int), max_new_tokens=2)
