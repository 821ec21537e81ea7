"""d₉₀ is read off scores as the sources define it."""

import numpy as np
import pytest

from lora_jax.analysis import intrinsic_dimension
from lora_jax.core.errors import RequestError

DIMS = [4, 16, 64, 256]


def test_it_is_the_first_dimension_whose_mean_reaches_the_share():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, full = rng.uniform(size=(4, 3)), rng.uniform(0.3, 1.2)
        found = intrinsic_dimension(DIMS, scores, full)
        reached = [d for d, row in zip(DIMS, scores, strict=True) if np.mean(row) >= 0.9 * full]
        assert found.dimension == (min(reached) if reached else None)
        for seed, own in enumerate(found.per_seed):
            mine = [d for d, s in zip(DIMS, scores[:, seed], strict=True) if s >= 0.9 * full]
            assert own == (min(mine) if mine else None)
        assert found.below == max([d for d in DIMS if d < (found.dimension or 1e9)], default=0)


def test_a_share_of_1_is_all_of_it_and_nothing_tried_may_be_enough():
    assert intrinsic_dimension(DIMS, [[1.0]] * 4, 1.0, share=1.0).dimension == 4
    none = intrinsic_dimension(DIMS, [[0.1]] * 4, 1.0)
    assert (none.dimension, none.below, none.per_seed) == (None, 256, (None,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], np.ones((0, 1)), 1.0), "dims are"),
        (([4, 4], np.ones((2, 1)), 1.0), r"dims are \[4, 4\]"),
        ((DIMS, np.ones(4), 1.0), r"scores are \(4,\) for 4"),
        ((DIMS, np.ones((4, 0)), 1.0), r"scores are \(4, 0\)"),
        ((DIMS, np.full((4, 1), np.nan), 1.0), "scores hold NaN"),
        ((DIMS, np.ones((4, 1)), 0.0), "full score of 0.0"),
    ],
)
def test_scores_that_say_nothing_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        intrinsic_dimension(*arguments)
