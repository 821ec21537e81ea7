"""Data: texts and targets from files, their tokens, and batches by a reproducible schedule."""

from lora_jax.data.batches import Batch, EvalBatches, TrainIterator, eval_batches, train_batches
from lora_jax.data.completions import encode_completions, prompt_ids
from lora_jax.data.examples import Examples, Splits, limit_examples, references_of
from lora_jax.data.glue import glue_task
from lora_jax.data.newsgroups import load_newsgroups
from lora_jax.data.reviews import load_reviews
from lora_jax.data.schedule import ScheduledBatch, bucket_lengths, epoch_schedule
from lora_jax.data.sources import load_splits
from lora_jax.data.tokenize import EncodedExamples, encode_examples

__all__ = [
    "Batch",
    "EncodedExamples",
    "EvalBatches",
    "Examples",
    "ScheduledBatch",
    "Splits",
    "TrainIterator",
    "bucket_lengths",
    "encode_completions",
    "encode_examples",
    "epoch_schedule",
    "eval_batches",
    "glue_task",
    "limit_examples",
    "load_newsgroups",
    "load_reviews",
    "load_splits",
    "prompt_ids",
    "references_of",
    "train_batches",
]
