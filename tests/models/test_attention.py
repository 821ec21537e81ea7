"""Attention as accelerators run it and as the CPU does: the same numbers, the same gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import attention
from lora_jax.models.attention import MASKED, attend_heads, causal_bias, rope_frequencies, rotate


def operands(num_heads, num_key_heads, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.standard_normal((3, 6, heads, 4)), "float32")  # noqa: E731
    mask = np.ones((3, 6), np.int32)
    mask[0, :2], mask[1, 4:] = 0, 0  # padded on the left, on the right
    return draw(num_heads), draw(num_key_heads), draw(num_key_heads), jnp.asarray(mask)


def by_numpy(q, k, v, visible):
    """float64, one head and one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        columns = [s for s in range(k.shape[1]) if visible[b, t, s]]
        group = n // (q.shape[2] // k.shape[2])
        if columns:
            scores = k[b, columns, group] @ q[b, t, n] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, columns, group] / weights.sum()
    return out


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(("num_key_heads", "window"), [(4, None), (2, None), (1, 3)])
def test_both_ways_equal_float64(backend, num_key_heads, window, monkeypatch):
    q, k, v, mask = operands(4, num_key_heads)
    # The library's product runs on any backend; only the choice is the backend's.
    monkeypatch.setattr(attention.jax, "default_backend", lambda: backend)
    bias = causal_bias(mask, 6, window=window)
    mixed = np.asarray(jax.jit(lambda *qkv: attend_heads(*qkv, bias))(q, k, v))
    visible = np.asarray(bias[:, 0]) == 0.0
    expected = by_numpy(q, k, v, visible)
    sees = visible.any(-1)
    np.testing.assert_allclose(mixed[sees], expected[sees], rtol=0, atol=1e-5)
    # A query with nothing to attend to gives numbers, not NaN.
    assert np.isfinite(mixed).all() and not sees.all()


def test_gradients_of_both_ways_agree(monkeypatch):
    q, k, v, mask = operands(4, 2)
    real = (mask[..., None, None] == 1).astype("float32")
    gradients = []
    for backend in ("cpu", "tpu"):
        monkeypatch.setattr(attention.jax, "default_backend", lambda backend=backend: backend)
        loss = lambda q, k, v: jnp.sum(real * attend_heads(q, k, v, causal_bias(mask, 6)) ** 2)  # noqa: E731
        gradients.append(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    for one, two in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)


def test_a_query_sees_its_own_column_and_earlier_ones_within_the_window():
    mask = jnp.asarray([[0, 1, 1, 1, 1]])
    visible = np.asarray(causal_bias(mask, 2, start=3, window=3)[0, 0]) == 0.0
    assert visible.tolist() == [[False, True, True, True, False], [False, False, True, True, True]]
    assert float(causal_bias(mask, 1)[0, 0, 0, 0]) == np.float32(MASKED)


def test_rotation_depends_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), "float32") for _ in range(2))
    frequencies = rope_frequencies(8, 10000.0, None)
    at = lambda x, place: rotate(x, jnp.full((1, 1), place), frequencies)  # noqa: E731
    scores = [float(jnp.sum(at(q, 5 + n) * at(k, 2 + n))) for n in (0, 7, 100)]
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-4)
    assert abs(float(jnp.sum(at(q, 5) * at(k, 3))) - scores[0]) > 1e-3
