"""Padded batches: a Grain pipeline for training, a plain sequence for evaluation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.data.schedule import ScheduledBatch, epoch_schedule, length_order, num_batches
from lora_jax.data.tokenize import EncodedExamples

Batch = dict[str, np.ndarray]

# The arrays of a batch that have an axis of tokens; the others have one value an example.
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "loss_mask")


class TrainIterator(Iterator[Batch]):
    """Endless training batches, epoch after epoch; its state is a small JSON-serialisable dict.

    `next_step` counts the batches given so far; `steps_per_epoch` and `fingerprint` (hex SHA-256 of
    all that decides the schedule) hold for all processes alike, and so does the state: a run may
    resume on another number of processes.
    """

    def __init__(self, source: TrainSource, *, num_threads: int = 0):
        import grain

        self.source = source
        self.steps_per_epoch = source.steps_per_epoch
        self.fingerprint = source.fingerprint
        # Everything is in memory and a batch takes tens of microseconds to fill: threads only help
        # where the loop itself is busy, and never change the order.
        as_source = cast(Any, source)  # of Grain's protocol, without being a Sequence
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
        self._batches = iter(grain.MapDataset.source(as_source).to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._batches)

    def widest(self, num_steps: int) -> Batch:
        """The first batch of the longest bucket among the first `num_steps` batches, of the first
        epoch at most; the iterator stays where it is."""
        lengths = [scheduled.bucket for scheduled in self.source.schedule(0)[:num_steps]]
        return self.source[lengths.index(max(lengths))]

    @property
    def next_step(self) -> int:
        """The number of the batch that comes next, from 0."""
        return int(self._batches.get_state()["next_index"])

    def get_state(self) -> dict[str, int | str]:
        """Where the iterator stands: {"next_step", "schedule"}."""
        return {"next_step": self.next_step, "schedule": self.fingerprint}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Goes to where `get_state` was taken; the batches that follow are the same, bit for bit.

        Raises `RequestError` if the state is of another schedule (data, buckets, batch size, seed).
        """
        if state["schedule"] != self.fingerprint:
            raise RequestError(
                "the saved data position is of other data, buckets, batch size or data seed "
                f"({str(state['schedule'])[:12]}, here {self.fingerprint[:12]}); resume with the "
                "configuration it was saved with"
            )
        self._batches.set_state({"next_index": int(state["next_step"])})


def train_batches(
    examples: EncodedExamples,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    order_seed: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
) -> TrainIterator:
    """An endless, resumable iterator over training batches, by `epoch_schedule`.

    Each batch holds input_ids and attention_mask (B, T) int32, labels (B,) int32 (numbers: float32)
    and weights (B,) float32, where T is the batch's bucket and B is `batch_size / process_count`:
    this process' block of the global batch's rows. Completions have loss_mask (B, T) int32 too, 1
    on the tokens that are to be predicted, and as weights how many these are; two texts of which
    the tokenizer tells the second, token_type_ids (B, T) int32. Rows that fill up an epoch's last
    batch have weight 0, label 0 and one attended padding token (attention over nothing would give
    NaN, and 0 x NaN is NaN).
    Raises `RequestError` for no examples or a batch that does not divide among the processes.
    """
    source = TrainSource(
        examples,
        batch_size=batch_size,
        buckets=tuple(buckets),
        seed=seed,
        order_seed=order_seed,
        rows=process_rows(batch_size, process_index, process_count),
    )
    source.schedule(0)  # Errors come here, where the request is made, not at the first batch.
    return TrainIterator(source, num_threads=num_threads)


class TrainSource:
    """Random access to training batch i of an endless run: the source that Grain iterates over."""

    def __init__(
        self,
        examples: EncodedExamples,
        *,
        batch_size: int,
        buckets: tuple[int, ...],
        seed: int,
        order_seed: int | None,
        rows: slice,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.rows = rows
        # An epoch's schedule is a few array sorts; two, since threads read across the boundary.
        known = {"batch_size": batch_size, "seed": seed, "order_seed": order_seed}
        self.schedule = functools.lru_cache(maxsize=2)(
            lambda epoch: epoch_schedule(examples.lengths, buckets, epoch=epoch, **known)
        )
        self.steps_per_epoch = num_batches(len(examples), batch_size)
        digest = hashlib.sha256(b"lora_jax schedule 1\n")
        order_seed = seed if order_seed is None else order_seed
        digest.update(repr((batch_size, buckets, seed, order_seed)).encode())
        beside = (x for x in (examples.type_ids, examples.prompt_lengths) if x is not None)
        for array in (examples.offsets, examples.ids, examples.labels, *beside):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(int(step), self.steps_per_epoch)
        scheduled = self.schedule(epoch)[position]
        batch = pad_batch(self.examples, scheduled, batch_size=self.batch_size, rows=self.rows)
        del batch["index"]
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvalBatches(Sequence):
    """Evaluation batches, by length, each example once; made anew whenever asked for.

    As training batches, and with "index" (B,) int64: the example a row holds, -1 in rows that only
    fill up the last batch (weight 0).
    """

    examples: EncodedExamples = dataclasses.field(kw_only=False)
    schedule: tuple[ScheduledBatch, ...]
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        scheduled = self.schedule[number]
        return pad_batch(self.examples, scheduled, batch_size=self.batch_size, rows=self.rows)


def eval_batches(
    examples: EncodedExamples,
    *,
    batch_size: int,
    buckets: Sequence[int],
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """All examples once, in batches of `batch_size` rows in order of length; see `EvalBatches`.

    Raises `RequestError` for a batch that does not divide among the processes.
    """
    rows = process_rows(batch_size, process_index, process_count)
    schedule = length_order(examples.lengths, tuple(buckets), batch_size=batch_size)
    return EvalBatches(examples, schedule=tuple(schedule), batch_size=batch_size, rows=rows)


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """This process' rows of a global batch: block `process_index` of `process_count` equal ones.

    Raises `RequestError` if the rows do not divide evenly.
    """
    if not 0 <= process_index < process_count:
        raise RequestError(
            f"process_index={process_index} of {process_count} processes; they count from 0"
        )
    if batch_size < 1 or batch_size % process_count:
        raise RequestError(
            f"a batch of {batch_size} rows does not divide among {process_count} processes; choose "
            f"a multiple of {process_count} for data.batch_size and train.eval_batch_size"
        )
    each = batch_size // process_count
    return slice(process_index * each, (process_index + 1) * each)


def pad_batch(
    examples: EncodedExamples, scheduled: ScheduledBatch, *, batch_size: int, rows: slice
) -> Batch:
    """`rows` of the global batch `scheduled`, filled up to `batch_size` rows, with "index"."""
    index_B = np.full(batch_size, -1, np.int64)
    index_B[: len(scheduled.indices)] = scheduled.indices
    index_B = index_B[rows]
    real_B = index_B >= 0
    start_B = np.where(real_B, examples.offsets[index_B], 0)
    length_B = np.where(real_B, examples.offsets[index_B + 1] - start_B, 1)
    column_T = np.arange(scheduled.bucket)
    mask_BT = column_T < length_B[:, None]
    # Columns past an example's end read its neighbour's tokens, or the last one; then are masked.
    place_BT = np.minimum(start_B[:, None] + column_T, len(examples.ids) - 1)
    keep_BT = mask_BT & real_B[:, None]
    numbers = np.issubdtype(examples.labels.dtype, np.floating)
    batch = {
        "input_ids": np.where(keep_BT, examples.ids[place_BT], examples.pad_id).astype(np.int32),
        "attention_mask": mask_BT.astype(np.int32),
        "labels": np.where(real_B, examples.labels[index_B], 0).astype(
            np.float32 if numbers else np.int32
        ),
        "weights": real_B.astype(np.float32),
        "index": index_B,
    }
    if examples.type_ids is not None:
        types_BT = np.where(keep_BT, examples.type_ids[place_BT], 0)
        batch["token_type_ids"] = types_BT.astype(np.int32)
    if examples.prompt_lengths is not None:
        asked_BT = keep_BT & (column_T >= examples.prompt_lengths[index_B][:, None])
        batch["loss_mask"] = asked_BT.astype(np.int32)
        batch["weights"] = asked_BT.sum(1).astype(np.float32)
    return batch
