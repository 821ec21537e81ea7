"""Training batches resume and shard exactly; padding carries no weight."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.core.errors import RequestError
from lora_jax.data import EncodedExamples, epoch_schedule, eval_batches, train_batches

BUCKETS = (4, 7, 12)
PAD = 3
BATCH_SIZE = 4


def encoded(lengths, seed=0):
    """Examples whose first token is 100 + their number, so a row tells where it came from."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(10, 100, offsets[-1]).astype(np.int32)
    ids[offsets[:-1]] = 100 + np.arange(len(lengths))
    labels = rng.integers(0, 3, len(lengths)).astype(np.int32)
    return EncodedExamples(ids=ids, offsets=offsets, labels=labels, pad_id=PAD)


def make(examples, **changes):
    options = {"batch_size": BATCH_SIZE, "buckets": BUCKETS, "seed": 0} | changes
    return train_batches(examples, **options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key].dtype == two[key].dtype
            np.testing.assert_array_equal(one[key], two[key])


LENGTHS = np.random.default_rng(1).integers(1, 13, 30)
length_lists = st.lists(st.integers(1, BUCKETS[-1]), min_size=1, max_size=40).map(np.array)


@given(length_lists, st.integers(0, 1000))
def test_rows_hold_their_example_and_padding_weighs_nothing(lengths, seed):
    examples = encoded(lengths)
    iterator = make(examples, seed=seed)
    seen = []
    for batch in take(iterator, iterator.steps_per_epoch):
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "input_ids": "int32",
            "attention_mask": "int32",
            "labels": "int32",
            "weights": "float32",
        }
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[0] == BATCH_SIZE
        assert batch["input_ids"].shape[1] in BUCKETS
        for ids, mask, label, weight in zip(*batch.values(), strict=True):
            if weight == 0:
                assert (ids == PAD).all()
                assert mask.sum() == 1, "attention over no token at all is NaN"
                assert label == 0
                continue
            assert weight == 1
            number = int(ids[0]) - 100
            length = lengths[number]
            seen.append(number)
            np.testing.assert_array_equal(ids[:length], examples.tokens(number))
            assert (ids[length:] == PAD).all()
            np.testing.assert_array_equal(mask, np.arange(len(ids)) < length)
            assert label == examples.labels[number]
    assert sorted(seen) == list(range(len(lengths)))


def test_batches_follow_the_schedule_of_each_epoch():
    iterator = make(encoded(LENGTHS), seed=7)
    for epoch in range(3):
        expected = epoch_schedule(LENGTHS, BUCKETS, batch_size=BATCH_SIZE, seed=7, epoch=epoch)
        for batch, (bucket, indices) in zip(
            take(iterator, iterator.steps_per_epoch), expected, strict=True
        ):
            assert batch["input_ids"].shape == (BATCH_SIZE, bucket)
            first = batch["input_ids"][batch["weights"] > 0, 0]
            np.testing.assert_array_equal(first - 100, indices)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resuming_at_any_step_gives_the_same_remaining_batches(num_threads):
    examples = encoded(LENGTHS)
    iterator = make(examples, num_threads=num_threads)
    total = 2 * iterator.steps_per_epoch + 3
    states, batches = [], []
    for _ in range(total):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for step, state in enumerate(states):
        assert state["next_step"] == step
        fresh = make(examples, num_threads=num_threads)
        fresh.set_state(state)
        assert fresh.next_step == step
        assert_equal(take(fresh, total - step), batches[step:])


def test_going_back_repeats_the_batches():
    iterator = make(encoded(LENGTHS), num_threads=2)
    take(iterator, 3)
    state = iterator.get_state()
    first = take(iterator, 12)
    iterator.set_state(state)
    assert_equal(take(iterator, 12), first)


def test_threads_do_not_change_the_batches():
    examples = encoded(LENGTHS)
    assert_equal(take(make(examples), 20), take(make(examples, num_threads=3), 20))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"order_seed": 1}, {"batch_size": 8}, {"buckets": (12,)}, {"labels": 1}],
)
def test_a_state_of_another_schedule_is_refused(changes):
    state = make(encoded(LENGTHS)).get_state()
    seed = changes.pop("labels", 0)
    with pytest.raises(RequestError, match="other data, buckets, batch size or data seed"):
        make(encoded(LENGTHS, seed), **changes).set_state(state)


@settings(max_examples=30)
@given(length_lists, st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_shards_are_the_blocks_of_the_global_batch(lengths, count, seed):
    examples = encoded(lengths)
    whole = make(examples, seed=seed)
    shards = [
        make(examples, seed=seed, process_index=index, process_count=count)
        for index in range(count)
    ]
    assert {shard.fingerprint for shard in shards} == {whole.fingerprint}
    for batch in take(whole, whole.steps_per_epoch + 1):
        parts = [next(shard) for shard in shards]
        assert all(len(part["weights"]) == BATCH_SIZE // count for part in parts)
        assert_equal([{key: np.concatenate([p[key] for p in parts]) for key in batch}], [batch])


@pytest.mark.parametrize("order_seeds", [(0, 1), (3, None)])
def test_shapes_are_shared_by_runs_with_their_own_order(order_seeds):
    one, two = (make(encoded(LENGTHS), order_seed=seed) for seed in order_seeds)
    ours, theirs = take(one, 24), take(two, 24)
    for a, b in zip(ours, theirs, strict=True):
        assert a["input_ids"].shape == b["input_ids"].shape
        np.testing.assert_array_equal(a["weights"], b["weights"])
    different = [
        not np.array_equal(a["input_ids"], b["input_ids"])
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert any(different)


@given(length_lists, st.integers(1, 9))
def test_evaluation_gives_each_example_once_with_its_index(lengths, batch_size):
    examples = encoded(lengths)
    batches = list(eval_batches(examples, batch_size=batch_size, buckets=BUCKETS))
    for batch in batches:
        assert batch["index"].dtype == np.int64
        assert batch["input_ids"].shape[0] == batch_size
        np.testing.assert_array_equal(batch["weights"], batch["index"] >= 0)
        real = batch["index"] >= 0
        np.testing.assert_array_equal(batch["input_ids"][real, 0] - 100, batch["index"][real])
        np.testing.assert_array_equal(batch["labels"][real], examples.labels[batch["index"][real]])
        lengths_there = batch["attention_mask"].sum(axis=1)
        np.testing.assert_array_equal(lengths_there[real], lengths[batch["index"][real]])
        assert (lengths_there[~real] == 1).all()
    index = np.concatenate([batch["index"] for batch in batches])
    assert sorted(index[index >= 0]) == list(range(len(lengths)))
    assert (index < 0).sum() < batch_size


def test_evaluation_shards_partition_each_batch_and_can_be_read_again():
    examples = encoded(LENGTHS)
    whole = eval_batches(examples, batch_size=8, buckets=BUCKETS)
    shards = [
        eval_batches(examples, batch_size=8, buckets=BUCKETS, process_index=i, process_count=4)
        for i in range(4)
    ]
    assert len(whole) == 4
    for _ in range(2):
        for batch, *parts in zip(whole, *shards, strict=True):
            joined = {key: np.concatenate([p[key] for p in parts]) for key in batch}
            assert_equal([joined], [batch])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_count": 3}, "4 rows does not divide among 3 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 of 2"),
        ({"batch_size": 0}, "batch of 0 rows"),
        ({"buckets": (4,)}, "the largest bucket 4"),
    ],
)
def test_bad_requests_fail_before_the_first_batch(changes, message):
    with pytest.raises(RequestError, match=message):
        make(encoded(LENGTHS), **changes)


def test_taken_examples_are_those_of_their_rows():
    examples = dataclasses.replace(
        encoded(LENGTHS), prompt_lengths=np.arange(len(LENGTHS)), type_ids=None
    )
    rows = np.array([4, 0, 0, 9])
    found = examples.take(rows)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(found.tokens(place), examples.tokens(row))
    np.testing.assert_array_equal(found.labels, examples.labels[rows])
    np.testing.assert_array_equal(found.prompt_lengths, rows)
    assert len(examples.take(np.zeros(0, np.int64))) == 0
