"""Which examples make up each batch of an epoch: a pure function of lengths and seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.settings import check


class ScheduledBatch(NamedTuple):
    """One global batch: padded length in tokens, and its examples (at most batch_size,) int64."""

    bucket: int
    indices: np.ndarray


def bucket_lengths(buckets: Sequence[int], max_length: int) -> tuple[int, ...]:
    """The padded lengths in use, in tokens: the buckets below `max_length`, then `max_length`.

    So the default buckets serve any `max_length`. Raises `RequestError` for lengths below 1.

    >>> bucket_lengths((16, 24, 32), 20)
    (16, 20)
    """
    listed = buckets if isinstance(buckets, tuple | list) else (None,)
    if not all(isinstance(n, int | float | np.number) and n >= 1 for n in (max_length, *listed)):
        raise RequestError(
            f"data.buckets={buckets!r} and data.max_length={max_length} are lengths in "
            "tokens; give whole numbers above 0"
        )
    return (*sorted({int(b) for b in buckets if b < max_length}), int(max_length))


def num_batches(num_examples: int, batch_size: int) -> int:
    """Batches in an epoch: all full but the last, whatever the buckets."""
    return -(-num_examples // batch_size)


def epoch_schedule(
    lengths: np.ndarray,
    buckets: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    order_seed: int | None = None,
) -> list[ScheduledBatch]:
    """The batches of one epoch over examples of `lengths` (N,) tokens, each example once.

    Examples are shuffled, sorted into the ascending `buckets`, and cut into batches; a bucket's
    remainder opens the next larger bucket, so that only the largest may end in a batch with fewer
    than `batch_size` examples. Then the batches are shuffled.

    The batches' shapes and their order depend on `lengths`, `seed` and `epoch` alone, since how
    many batches a bucket fills is a matter of counting. Runs with different `order_seed`s
    (default: `seed`) thus meet different examples in the same shapes, and can share a program.
    Raises `RequestError` for no examples, a batch size below 1 or a length above the last bucket.
    """
    lengths = np.asarray(lengths)
    check("data.batch_size", batch_size)
    check("data.seed", seed)
    check("seed", order_seed or 0)
    if len(lengths) == 0:
        raise RequestError("there are no training examples to make batches of")
    bucket_of = _bucket_numbers(lengths, buckets)
    order = _permutation(len(lengths), seed if order_seed is None else order_seed, epoch, 0)
    bucket_of = bucket_of[order]
    batches: list[ScheduledBatch] = []
    queue = np.zeros(0, np.int64)
    for number, bucket in enumerate(buckets):
        queue = np.concatenate([queue, order[bucket_of == number]])
        full = len(queue) // batch_size * batch_size
        batches += [ScheduledBatch(bucket, rows) for rows in queue[:full].reshape(-1, batch_size)]
        queue = queue[full:]
    if len(queue):
        # The largest bucket that any example needs: known from counting, like all other shapes.
        batches.append(ScheduledBatch(buckets[bucket_of.max()], queue))
    return [batches[i] for i in _permutation(len(batches), seed, epoch, 1)]


def drawn_rows(num_examples: int, num_drawn: int, *, seed: int) -> np.ndarray:
    """Which of the examples a run of this seed trains on, (num_drawn,) int64 in ascending order.

    Raises `RequestError` where there are not so many.
    """
    if num_drawn > num_examples:
        raise RequestError(
            f"data.draw={num_drawn}, but there are {num_examples} training examples; draw fewer"
        )
    return np.sort(_permutation(num_examples, seed, 0, 2)[:num_drawn])


def length_order(
    lengths: np.ndarray, buckets: Sequence[int], *, batch_size: int
) -> list[ScheduledBatch]:
    """Batches in order of length, each padded to the smallest bucket that holds it.

    For evaluation: each example once, nothing random; only the last batch may not be full.
    """
    bucket_of = _bucket_numbers(lengths, buckets)
    order = np.argsort(lengths, kind="stable").astype(np.int64)
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [ScheduledBatch(buckets[bucket_of[rows].max()], rows) for rows in chunks]


def _bucket_numbers(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The number of the smallest of the ascending `buckets` that holds each length, (N,) int64."""
    if len(lengths) and lengths.max() > buckets[-1]:
        raise RequestError(
            f"an example has {lengths.max()} tokens, the largest bucket {buckets[-1]}; encode "
            "with a max_length of at most that"
        )
    return np.searchsorted(np.asarray(buckets), lengths)


def _permutation(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of range(size), (size,) int64.

    By sorting the raw output of a bit generator, which NumPy promises never to change;
    `Generator.permutation` carries no such promise, and `verify` re-runs old cells.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, stream]))
    return np.argsort(bits.random_raw(size), kind="stable").astype(np.int64)
