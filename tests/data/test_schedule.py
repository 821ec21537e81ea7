"""The schedule: each example once an epoch, shapes decided by the data seed alone."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.core.errors import RequestError
from lora_jax.data.schedule import bucket_lengths, epoch_schedule, length_order, num_batches

BUCKETS = (4, 7, 12)
seeds = st.integers(0, 2**32)
length_lists = st.lists(st.integers(1, BUCKETS[-1]), min_size=1, max_size=80).map(np.array)


def schedule(lengths, batch_size=5, seed=0, epoch=0, order_seed=None):
    return epoch_schedule(
        lengths, BUCKETS, batch_size=batch_size, seed=seed, epoch=epoch, order_seed=order_seed
    )


def shapes(batches):
    return [(batch.bucket, len(batch.indices)) for batch in batches]


@given(length_lists, st.integers(1, 20), seeds, st.integers(0, 3))
def test_every_example_is_scheduled_once_an_epoch(lengths, batch_size, seed, epoch):
    batches = schedule(lengths, batch_size, seed, epoch)
    indices = np.concatenate([batch.indices for batch in batches])
    assert sorted(indices) == list(range(len(lengths)))
    assert len(batches) == num_batches(len(lengths), batch_size)


@given(length_lists, st.integers(1, 20), seeds)
def test_examples_fit_their_bucket_and_one_batch_at_most_is_short(lengths, batch_size, seed):
    batches = schedule(lengths, batch_size, seed)
    for batch in batches:
        assert lengths[batch.indices].max() <= batch.bucket
    longest = min(bucket for bucket in BUCKETS if bucket >= lengths.max())
    assert {batch.bucket for batch in batches} <= {b for b in BUCKETS if b <= longest}
    sizes = collections.Counter(len(batch.indices) for batch in batches)
    assert sum(count for size, count in sizes.items() if size != batch_size) <= 1
    assert max(sizes) <= batch_size


@given(length_lists, st.integers(1, 20), seeds)
def test_fewer_than_a_batch_of_examples_leave_each_bucket(lengths, batch_size, seed):
    moved = collections.Counter()
    for batch in schedule(lengths, batch_size, seed):
        for length in lengths[batch.indices]:
            own = min(bucket for bucket in BUCKETS if bucket >= length)
            if batch.bucket > own:
                moved[own] += 1
    assert sum(moved.values()) <= (len(BUCKETS) - 1) * (batch_size - 1)


@given(length_lists, st.integers(1, 20), seeds, seeds, seeds)
def test_shapes_do_not_depend_on_the_order_seed(lengths, batch_size, seed, first, second):
    one = schedule(lengths, batch_size, seed, order_seed=first)
    two = schedule(lengths, batch_size, seed, order_seed=second)
    assert shapes(one) == shapes(two)


@given(length_lists, st.integers(1, 20), seeds, seeds)
def test_the_multiset_of_shapes_is_the_same_for_all_seeds_and_epochs(lengths, batch_size, a, b):
    one, two = schedule(lengths, batch_size, a, 0), schedule(lengths, batch_size, b, 1)
    assert sorted(shapes(one)) == sorted(shapes(two))


def test_seed_epoch_and_order_seed_each_change_who_sits_where():
    lengths = np.random.default_rng(0).integers(1, 13, 200)

    def drawn(**kwargs):
        return [tuple(batch.indices) for batch in schedule(lengths, **kwargs)]

    base = drawn()
    assert drawn() == base
    assert drawn(order_seed=0) == base
    for changed in ({"seed": 1}, {"epoch": 1}, {"order_seed": 1}):
        assert drawn(**changed) != base
    assert shapes(schedule(lengths, seed=1)) != shapes(schedule(lengths))


def test_the_schedule_is_the_same_on_every_machine():
    """Written down once: raw generator output is promised never to change, so neither may this."""
    lengths = np.array([2, 9, 4, 6, 12, 1, 7, 3])
    drawn = schedule(lengths, batch_size=3, seed=5, epoch=2)
    recorded = [(7, [0, 6, 3]), (4, [2, 7, 5]), (12, [4, 1])]
    assert [(bucket, indices.tolist()) for bucket, indices in drawn] == recorded


@given(length_lists, st.integers(1, 20))
def test_evaluation_goes_by_length_and_takes_each_example_once(lengths, batch_size):
    batches = length_order(lengths, BUCKETS, batch_size=batch_size)
    indices = np.concatenate([batch.indices for batch in batches])
    assert sorted(indices) == list(range(len(lengths)))
    assert (np.diff(lengths[indices]) >= 0).all()
    for batch in batches:
        longest = lengths[batch.indices].max()
        assert batch.bucket == min(bucket for bucket in BUCKETS if bucket >= longest)


def test_evaluation_of_nothing_is_no_batches():
    assert length_order(np.zeros(0, np.int64), BUCKETS, batch_size=4) == []


@pytest.mark.parametrize(
    ("buckets", "max_length", "expected"),
    [
        ((16, 24, 32), 32, (16, 24, 32)),
        ((16, 24, 32), 64, (16, 24, 32, 64)),
        ((32, 16, 16), 20, (16, 20)),
        ((), 8, (8,)),
    ],
)
def test_buckets_end_at_the_maximum_length(buckets, max_length, expected):
    assert bucket_lengths(buckets, max_length) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bucket_lengths((0, 8), 8), r"data\.buckets=\(0, 8\).*above 0"),
        (lambda: bucket_lengths((8,), 0), r"data\.max_length=0"),
        (lambda: schedule(np.array([3]), batch_size=0), r"data\.batch_size=0"),
        (lambda: schedule(np.array([3]), seed=-1), r"data\.seed=-1"),
        (lambda: schedule(np.array([], np.int64)), r"no training examples"),
        (lambda: schedule(np.array([3, 13])), r"13 tokens, the largest bucket 12"),
        (lambda: length_order(np.array([13]), BUCKETS, batch_size=2), r"13 tokens"),
    ],
)
def test_bad_requests_name_the_value(call, message):
    with pytest.raises(RequestError, match=message):
        call()
