"""Ranks, intruders and amplification against float64 NumPy and closed forms."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import analysis
from lora_jax.core.errors import RequestError


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def orthonormal(seed, d, r):
    return np.linalg.qr(normal(seed, d, r))[0]


@pytest.mark.parametrize(("d_in", "r", "d_out"), [(9, 3, 14), (14, 5, 4), (6, 6, 6), (3, 8, 5)])
def test_the_svd_of_factors_is_that_of_their_product(d_in, r, d_out):
    a, b = normal(0, 2, d_in, r), normal(1, 2, r, d_out)
    scale = np.array([0.5, 3.0])
    u, s, v = analysis.delta_svd(a, b, scale)
    delta = scale[:, None, None] * (a @ b)
    k = min(d_in, r, d_out)
    wanted = np.linalg.svd(delta, compute_uv=False)[:, :k]
    np.testing.assert_allclose(s[:, :k], wanted, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(s[:, k:], 0.0, atol=1e-4)
    found = np.einsum("nik,nk,nok->nio", u, s, v)
    np.testing.assert_allclose(found, delta, atol=2e-5)


def test_a_negative_scale_turns_the_directions_of_one_side():
    a, b = normal(0, 6, 2), normal(1, 2, 5)
    u, s, v = analysis.delta_svd(a, b, -2.0)
    assert np.all(s > 0)
    np.testing.assert_allclose((u * s[None]) @ v.T, -2.0 * a @ b, atol=1e-5)


def test_ranks_are_those_of_float64_numpy():
    s = np.sort(np.abs(normal(0, 4, 7)), axis=-1)[:, ::-1].copy()
    s[3, 4:] = 0.0
    p = s / s.sum(-1, keepdims=True)
    entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
    np.testing.assert_allclose(analysis.entropy_rank(s), np.exp(entropy), rtol=1e-5)
    squares = s**2
    np.testing.assert_allclose(analysis.stable_rank(s), squares.sum(-1) / squares[:, 0], rtol=1e-5)
    for share in (0.5, 0.9, 0.99, 1.0):
        reached = np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)
        wanted = [int(np.argmax(row >= share - 1e-12)) + 1 for row in reached]
        assert analysis.energy_rank(s, share).tolist() == wanted


@pytest.mark.parametrize("measure", ["stable_rank", "entropy_rank", "energy_rank"])
def test_equal_directions_count_one_each_and_none_is_0(measure):
    rank = getattr(analysis, measure)
    for k in (1, 3, 8):
        s = np.r_[np.full(k, 2.5), np.zeros(8 - k)].astype(np.float32)
        # Of equal ones 90% is held by all but a tenth.
        wanted = np.ceil(0.9 * k) if measure == "energy_rank" else k
        assert float(rank(s)) == pytest.approx(wanted, rel=1e-5)
    assert float(rank(np.zeros(5, np.float32))) == 0.0


def test_intruders_are_counted_by_the_definition():
    kernel = normal(0, 12, 9)
    strong = 30 * np.outer(normal(1, 12), normal(2, 9))
    tuned = kernel + strong + 0.01 * normal(3, 12, 9)
    found = analysis.intruder_dimensions(kernel, tuned, num_directions=5)
    x, y = (np.linalg.svd(w)[2].T for w in (kernel, tuned))  # right vectors: outputs
    cosines = np.abs(x.T @ y[:, :5]).max(0)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)
    assert found.count.item() == (cosines < 0.5).sum()
    x, y = (np.linalg.svd(w)[0] for w in (kernel, tuned))
    cosines = np.abs(x[:, :9].T @ y[:, :5]).max(0)
    found = analysis.intruder_dimensions(kernel, tuned, num_directions=5, space="input")
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)


def test_a_planted_intruder_is_found_and_a_rescaled_kernel_has_none():
    """A direction spread evenly over all of the kernel's own is like none of them."""
    d = 16
    u, v = orthonormal(0, d, d), orthonormal(1, d, d)
    kernel = (u * np.linspace(4, 1, d)) @ v.T
    new = 50 * np.outer(u.sum(1), v.sum(1)) / d
    found = analysis.intruder_dimensions(kernel, kernel + new)
    assert found.count.item() == 1 and found.cosines[0] == pytest.approx(1 / 4, abs=0.02)
    grown = (u * np.linspace(9, 2, d)) @ v.T
    assert analysis.intruder_dimensions(kernel, grown).count.item() == 0


def test_amplification_of_a_planted_change_is_in_closed_form():
    """ΔW = δ u₅v₅ᵀ + δ' u₇v₇ᵀ where W has σ₅, σ₇ there: factor ‖(δ, δ')‖ / ‖(σ₅, σ₇)‖."""
    u, v = orthonormal(0, 12, 10), orthonormal(1, 10, 10)
    sigma = np.linspace(5.0, 0.5, 10)
    kernel = (u * sigma) @ v.T
    delta = 3.0 * np.outer(u[:, 5], v[:, 5]) + 2.0 * np.outer(u[:, 7], v[:, 7])
    row = analysis.amplification(delta, kernel, 2)
    assert row.from_delta.item() == pytest.approx(np.hypot(sigma[5], sigma[7]), rel=1e-5)
    assert row.delta_norm.item() == pytest.approx(np.hypot(3.0, 2.0), rel=1e-5)
    assert row.factor.item() == pytest.approx(
        np.hypot(3, 2) / np.hypot(sigma[5], sigma[7]), rel=1e-5
    )
    assert row.from_kernel.item() == pytest.approx(np.hypot(sigma[0], sigma[1]), rel=1e-5)
    assert row.kernel_norm.item() == pytest.approx(np.linalg.norm(sigma), rel=1e-5)


def test_amplification_is_that_of_float64_numpy_for_factors_and_stacks():
    a, b, kernel = normal(0, 2, 14, 3), normal(1, 2, 3, 9), normal(2, 2, 14, 9)
    found = analysis.adapter_amplification(a, b, 0.5, kernel)
    dense = analysis.amplification(0.5 * (a @ b), kernel, 3)
    for n in range(2):
        u, s, vh = np.linalg.svd(0.5 * (a[n] @ b[n]))
        inside = np.linalg.norm(u[:, :3].T @ kernel[n] @ vh[:3].T)
        for row in (found, dense):
            assert row.from_delta[n] == pytest.approx(inside, rel=2e-5)
            assert row.factor[n] == pytest.approx(np.linalg.norm(s) / inside, rel=2e-5)
        own = np.linalg.svd(kernel[n], compute_uv=False)
        assert found.from_kernel[n] == pytest.approx(np.linalg.norm(own[:3]), rel=1e-5)


def test_what_random_directions_see_of_a_kernel_has_the_expected_size():
    """E‖UᵀWV‖²_F = r² ‖W‖²_F / (d_in d_out) for random U, V of r directions."""
    kernel, rank = normal(0, 40, 30), 4
    delta = normal(1, 40, 30)
    seen = [
        analysis.amplification(delta, kernel, rank, key=jax.random.key(seed)).from_random.item()
        for seed in range(60)
    ]
    wanted = rank**2 * np.linalg.norm(kernel) ** 2 / (40 * 30)
    assert np.mean(np.square(seen)) == pytest.approx(wanted, rel=0.15)


def kernel_of(decay, d_in=96, d_out=80):
    """W with singular values from 5 down to 5·decay, and its vectors."""
    u, v = orthonormal(0, d_in, d_out), orthonormal(1, d_out, d_out)
    return (u * (5 * np.geomspace(1, decay, d_out))) @ v.T, u, v


@pytest.mark.parametrize("rank", [4, 64])
def test_a_random_change_of_any_rank_amplifies_as_its_null_says(rank):
    """The factor itself is 16 times larger at r = 4 than at r = 64 for a random ΔW of one norm."""
    kernel = np.broadcast_to(kernel_of(0.2)[0], (30, 96, 80))
    a, b = normal(2, 30, 96, rank), normal(3, 30, rank, 80)
    row = analysis.adapter_amplification(a, b, 1.0, kernel)
    null = np.linalg.norm(kernel[0]) * rank / np.sqrt(96 * 80)
    np.testing.assert_allclose(row.expected, null, rtol=1e-5)
    np.testing.assert_allclose(row.random_factor, np.linalg.norm(a @ b, axis=(1, 2)) / null, 1e-4)
    u, _, vh = np.linalg.svd(a[0] @ b[0])
    inside = np.linalg.norm(u[:, :rank].T @ kernel[0] @ vh[:rank].T)
    assert row.over_random[0] == pytest.approx(null / inside, rel=1e-3)
    assert np.mean(row.over_random) == pytest.approx(1.0, abs=0.1)


def test_a_change_where_the_kernel_is_strong_is_below_its_null_and_where_weak_far_above():
    kernel, u, v = kernel_of(0.01)
    top = analysis.amplification(u[:, :4] @ v[:, :4].T, kernel, 4)
    weakest = analysis.amplification(u[:, -4:] @ v[:, -4:].T, kernel, 4)
    assert top.over_random.item() < 0.1 and weakest.over_random.item() > 5
    for row in (top, weakest):
        ratio = row.factor.item() / row.random_factor.item()
        assert row.over_random.item() == pytest.approx(ratio, rel=1e-5)


def test_no_change_amplifies_nothing_and_fewer_directions_are_weighed_alone():
    kernel = normal(0, 12, 10)
    nothing = analysis.amplification(np.zeros((12, 10)), kernel, 2)
    assert nothing.factor == nothing.random_factor == nothing.over_random == 0.0
    delta = normal(1, 12, 10)
    u, s, vh = np.linalg.svd(delta)
    for rank in (1, 4):
        row = analysis.amplification(delta, kernel, rank)
        inside = np.linalg.norm(u[:, :rank].T @ kernel @ vh[:rank].T)
        assert row.factor.item() == pytest.approx(np.linalg.norm(s[:rank]) / inside, rel=2e-5)
        assert row.delta_norm.item() == pytest.approx(np.linalg.norm(s), rel=1e-5)


def intruders(**options):
    return analysis.intruder_dimensions(normal(0, 4, 3), normal(1, 4, 3), **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: analysis.energy_rank(np.ones(3), 0.0), "share is 0.0"),
        (lambda: analysis.stable_rank(np.float32(3)), "singular values"),
        (lambda: analysis.intruder_dimensions(normal(0, 3, 4), normal(0, 4, 3)), "the same kernel"),
        (lambda: intruders(num_directions=0), "num_directions is 0"),
        (lambda: intruders(threshold=1.5), "threshold 1.5"),
        (lambda: analysis.amplification(normal(0, 3, 4), normal(0, 4, 3), 1), "of one kernel"),
        (lambda: analysis.amplification(normal(0, 4, 3), normal(0, 4, 3), 4), "rank is 4.*1 to 3"),
    ],
)
def test_what_cannot_be_measured_is_named(call, words):
    with pytest.raises(RequestError, match=words):
        call()
