"""What may be drawn, against NumPy in float64; how often it is; what may not come twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.generate.sampling import draw, kept_logits, without_repeats


def kept_by_definition(logits, temperature, top_k, top_p):
    """The probabilities of one row: top-k of the tokens, then the fewest that reach top_p."""
    scaled = logits / temperature
    if top_k:
        kth = np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
        scaled = np.where(scaled >= kth, scaled, -np.inf)
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept, total = np.zeros(len(logits), bool), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if kept.any() and total >= top_p:
            break
        kept[token] = True
        total += probabilities[token]
    kept &= probabilities > 0
    return np.where(kept, probabilities, 0) / probabilities[kept].sum()


SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 0, 0.9),
    (1.5, 5, 1.0),
    (1.0, 7, 0.8),
    (2.0, 1, 0.9),
    (0.5, 0, 1e-9),
    (1.0, 1000, 0.5),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_distribution_is_the_one_defined(float64, settings):
    rng = np.random.default_rng(3)
    logits = rng.normal(0.0, 2.0, (4, 37))
    found = jax.nn.softmax(jax.jit(kept_logits)(logits, *settings), axis=-1)
    wanted = np.stack([kept_by_definition(row, *settings) for row in logits])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)


def test_top_k_keeps_what_equals_the_last_of_them(float64):
    kept = jax.jit(kept_logits)(jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0]]), 1.0, 2, 1.0)
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, True, True, True]])


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = np.array([1.0, 0.3, -0.5, 2.0, -3.0, 0.3])
    probabilities = kept_by_definition(logits, 1.3, 5, 0.9)
    number = 20_000
    kept = jax.jit(kept_logits)(jnp.array(logits, jnp.float32)[None], 1.3, 5, 0.9)
    keys = jax.random.split(jax.random.key(0), number)
    each = jnp.broadcast_to(kept, (number, len(logits)))
    tokens = jax.jit(draw)(keys, 0, each)
    counts = np.bincount(tokens, minlength=len(logits))
    deviations = np.sqrt(number * probabilities * (1 - probabilities))
    assert np.all(np.abs(counts - number * probabilities) <= 4.5 * deviations)
    assert (counts[probabilities == 0] == 0).all() and (probabilities == 0).any()
    again = jax.jit(draw)(keys, 1, each)
    # A second step draws anew: two independent draws agree with the sum of squares.
    agree, expected = np.mean(tokens == again), np.sum(probabilities**2)
    assert abs(agree - expected) < 4.5 * np.sqrt(expected * (1 - expected) / number)


def banned_by_definition(seen, size):
    """Tokens that would complete a run of `size` tokens that is in `seen` already."""
    runs = {tuple(seen[n : n + size]) for n in range(len(seen) - size + 1)}
    recent = tuple(seen[len(seen) - size + 1 :])
    return {run[-1] for run in runs if len(recent) == size - 1 and run[:-1] == recent}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_run_of_tokens_comes_twice(size):
    rng = np.random.default_rng(size)
    vocabulary, rows, length = 4, 64, 11
    seen = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    ban = jax.jit(without_repeats, static_argnames="size")
    num_banned = 0
    for first, filled in [(0, 11), (0, 7), (3, 9), (5, 7), (6, 7), (2, 4)]:
        scores = ban(np.zeros((rows, vocabulary)), seen, size=size, first=first, filled=filled)
        for row in range(rows):
            banned = banned_by_definition(seen[row, first:filled].tolist(), size)
            assert set(np.flatnonzero(np.isneginf(scores[row]))) == banned
            num_banned += len(banned)
    assert num_banned > 10
