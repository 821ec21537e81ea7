"""Intervals over seeds, and the second editions' measures, on planted adapters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from experiments.analysis import delta_vs_weight_2, directions_2, learned
from experiments.analysis.evidence import jackknife, mean_of_pairs
from lora_jax import RequestError
from lora_jax.peft import Factors

D = 96
PATHS = [f"encoder/layers/0/attention/{kind}/kernel" for kind in ("query", "value")]
SEEDS = (0, 1, 2, 3)


def test_of_a_mean_over_seeds_the_jackknife_is_students_interval():
    values = np.random.default_rng(0).normal(size=7)
    own = [(n, n) for n in range(7)]
    interval = jackknife(mean_of_pairs(values, own), range(7)).interval(0.9)
    found = (interval.estimate, interval.low, interval.high)
    low, high = stats.t.interval(0.9, 6, values.mean(), stats.sem(values))
    np.testing.assert_allclose(found, (values.mean(), low, high), rtol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_intervals_of_pair_means_cover_the_truth_and_those_that_take_pairs_for_free_do_not(noise):
    """Pairs of one seed share its effect. Of 400 intervals at 95%, 92% or more hold the truth."""
    rng = np.random.default_rng(0)
    pairs = list(itertools.combinations(range(10), 2))
    covered, naive = [], []
    for _ in range(400):
        effects = rng.normal(size=10)
        values = [effects[m] + effects[n] + noise * rng.normal() for m, n in pairs]
        interval = jackknife(mean_of_pairs(values, pairs), range(10)).interval()
        covered.append(interval.low < 0 < interval.high)
        low, high = stats.t.interval(0.95, 44, np.mean(values), stats.sem(values))
        naive.append(low < 0 < high)
    assert np.mean(covered) > 0.92 and np.mean(naive) < 0.75


def test_two_seeds_have_no_interval():
    with pytest.raises(RequestError, match="2 seeds"):
        jackknife(len, [0, 1])


@pytest.fixture
def planted(monkeypatch):
    """Adapters by `(rank, seed)`: nested starts, `b` and a learned part of its own each. All read
    one planted direction in value, which is strong, and none in query."""
    rng = np.random.default_rng(0)
    common = np.linalg.qr(rng.normal(size=(D, 1)))[0]
    starts = {seed: rng.uniform(-1, 1, size=(2, D, 12)) / np.sqrt(D) for seed in SEEDS}

    def factors_at(folder):
        rank, seed = folder
        own = np.random.default_rng([rank, seed])
        found = {}
        for n, path in enumerate(PATHS):
            a = starts[seed][n, :, :rank] + 0.05 * own.normal(size=(D, rank))
            b = own.normal(size=(rank, D))
            if n:
                a, b = (
                    np.c_[a[:, :-1], a[:, -1:] + 2 * common],
                    b * np.r_[np.ones(rank - 1), 3][:, None],
                )
            found[path] = Factors(a, b, 1.0)
        return found

    def starts_at(folder):
        rank, seed = folder
        return dict(zip(PATHS, starts[seed][:, :, :rank], strict=True))

    kernels = {path: rng.normal(size=(D, D)) for path in PATHS}
    monkeypatch.setattr(learned, "factors_at", factors_at)
    monkeypatch.setattr(learned, "starts_at", starts_at)
    monkeypatch.setattr(learned, "kernels_at", lambda folder, paths: kernels)
    svds = {path: np.linalg.svd(kernel) for path, kernel in kernels.items()}
    full = {
        (name, seed): {
            path: 3 * np.outer(u[:, 0], vh[0])
            + 0.02 * np.random.default_rng([n, seed]).normal(size=(D, D))
            for path, (u, _, vh) in svds.items()
        }
        for n, name in enumerate(("qv-full", "full"))
        for seed in SEEDS
    }
    monkeypatch.setattr(learned, "full_deltas_at", lambda folder, paths: full[folder])
    arms = {f"qv-r{n}": {s: (r, s) for s in SEEDS} for n, r in ((8, 3), (64, 12))}
    return arms | {name: {s: (name, s) for s in SEEDS} for name in ("qv-full", "full")}


def test_directions_are_counted_where_they_are_planted_and_starts_are_told_from_them(
    planted, tmp_path
):
    directions_2.save(directions_2.measure(planted, few=3), tmp_path)
    data = directions_2.read(tmp_path)
    assert data["matrices"] == PATHS and data["ranks"] == [3, 12] and data["width"] == D
    of_seeds = data["seeds"]
    assert np.array_equal(of_seeds["pairs"], list(itertools.combinations(SEEDS, 2)))
    for name in ("count", "count_few"):
        query, value = np.mean(of_seeds[name], axis=0)
        assert query == pytest.approx(0, abs=0.2) and value == pytest.approx(1, abs=0.2)
    # The planted direction is the first of both.
    gains = np.array(of_seeds["gains"])
    assert gains[1, 0] > 0.6 and np.max(gains[0]) < 0.5
    np.testing.assert_allclose(gains.sum(1), 12 * np.mean(of_seeds["phi_all"], axis=0), rtol=1e-4)
    across, within = data["ranks_across"], data["ranks_within"]
    assert len(across["pairs"]) == 12 and within["pairs"] == [[s, s] for s in SEEDS]
    for part in (across, within):
        for name in ("count_outside", "count_others"):
            np.testing.assert_allclose(np.mean(part[name], axis=0), [0, 1], atol=0.26)
    assert np.mean(within["count"], axis=0)[0] >= 2.5 and np.mean(across["count"], axis=0)[0] < 0.3
    found = {one.name: one for one in directions_2.verdicts(data)}
    assert found["more_in_v"].low > 0.5 and found["few"].high < 4
    assert found["start_is_most"].estimate == pytest.approx(
        np.mean(within["count"]) - np.mean(within["count_others"])
    )
    assert found["nothing_left"].level == 0.90
    seeds, ranks = directions_2.tables(data)
    assert "layer 0 value" in seeds and ranks.count("\n") == 3
    assert len(directions_2.figure(data).axes) == 2


def test_held_is_that_of_float64_numpy_and_full_rank_reads_what_was_planted(planted, tmp_path):
    data = delta_vs_weight_2.measure(planted, directions=(3, 12))
    delta_vs_weight_2.save(data, tmp_path)
    data = delta_vs_weight_2.read(tmp_path)
    kernels = learned.kernels_at(None, PATHS)
    factors = learned.factors_at(planted["qv-r8"][1])
    deltas = [
        (factors[p].a @ factors[p].b, learned.full_deltas_at(("full", 1), PATHS)[p]) for p in PATHS
    ]
    for n, path in enumerate(PATHS):
        kernel = kernels[path]
        for delta, arm in zip(deltas[n], ("qv-r8", "full"), strict=True):
            u, s, vh = np.linalg.svd(delta)
            inside = np.linalg.norm(u[:, :3].T @ kernel @ vh[:3].T)
            held = inside / (np.linalg.norm(kernel) * 3 / D)
            own = data["arms"][arm]
            assert own["first_few"]["held"][1][n] == pytest.approx(held, rel=1e-3)
            top = np.linalg.norm(np.linalg.svd(kernel, compute_uv=False)[:3])
            assert own["first_few"]["of_top"][1][n] == pytest.approx(inside / top, rel=1e-3)
            assert own["delta_norm"][1][n] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
            energy = np.cumsum(s**2) / np.sum(s**2)
            assert own["energy_rank"][1][n] == np.argmax(energy >= 0.9) + 1
    assert "first_many" not in data["arms"]["qv-r8"] and "first_many" in data["arms"]["qv-r64"]
    found = {one.name: one for one in delta_vs_weight_2.verdicts(data)}
    assert found["full_holds_more"].low > 0.25
    held = np.mean(data["arms"]["qv-r8"]["first_few"]["held"], axis=1)
    low, high = stats.t.interval(0.95, len(SEEDS) - 1, held.mean(), stats.sem(held))
    one = found["more_than_random"]
    np.testing.assert_allclose((one.estimate, one.low, one.high), (held.mean(), low, high), 1e-9)
    against, spectra = delta_vs_weight_2.tables(data)
    assert against.count("\n") == 8 and spectra.count("\n") == 5
    assert len(delta_vs_weight_2.figure(data).axes) == 2


def test_arms_that_do_not_fit_are_named(planted):
    with pytest.raises(RequestError, match="the same, at least three"):
        directions_2.measure({**planted, "qv-r8": {0: (3, 0)}})
    with pytest.raises(RequestError, match="there is no arm full"):
        delta_vs_weight_2.measure({name: planted[name] for name in planted if name != "full"})
    with pytest.raises(RequestError, match="qv-full and full have one ΔW"):
        same = {**planted, "full": planted["qv-full"]}
        delta_vs_weight_2.measure(same, directions=(3, 12))
    with pytest.raises(RequestError, match="full has the seeds"):
        delta_vs_weight_2.measure({**planted, "full": {0: ("full", 0)}})
