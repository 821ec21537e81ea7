"""What a model is trained for: its targets, how they are encoded, how a batch is scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.data import EncodedExamples, Examples, Splits, encode_completions, encode_examples
from lora_jax.models import Model
from lora_jax.settings import check

# A number within this of its label counts as right.
NEAR = 0.5


class ExampleScores(NamedTuple):
    """Per example: `losses` (B,) float32 or wider; `correct` (B,), bool or a share; what was
    predicted, (B,) int32 classes or float32 numbers, None for texts.
    """

    losses: jax.Array
    correct: jax.Array
    predictions: jax.Array | None


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy per example in at least float32: `(1-e) * -log p[y] + e * mean_k(-log p[k])`.

    Shapes: `logits (..., classes)` of any float dtype, `labels (...)` int; the result is `(...)`.
    Source: Szegedy et al. 2016 (arXiv:1512.00567), §7, with uniform u(k).

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), smoothing=0.1)[0].item()  # log 4
    1.386294...
    """
    log_p = jax.nn.log_softmax(logits.astype(float32_or_wider(logits.dtype)), axis=-1)
    nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    if smoothing == 0.0:
        return nll
    return (1.0 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1)


def score_classes(logits: jax.Array, batch: Any, *, smoothing: float = 0.0) -> ExampleScores:
    """Cross-entropy of `logits (B, classes)` at `labels (B,)`, and whether the largest is there."""
    losses = cross_entropy(logits, batch["labels"], smoothing=smoothing)
    predictions = jnp.argmax(logits, -1)
    right = predictions == batch["labels"].astype(predictions.dtype)
    return ExampleScores(losses, right, predictions)


def score_numbers(outputs: jax.Array, batch: Any, *, smoothing: float = 0.0) -> ExampleScores:
    """Squared error of `outputs (B, 1)` from `labels (B,)`, and whether it is within `NEAR`."""
    predictions = outputs[..., 0].astype(float32_or_wider(outputs.dtype))
    errors = predictions - batch["labels"]
    return ExampleScores(errors**2, jnp.abs(errors) <= NEAR, predictions)


def score_tokens(logits: jax.Array, batch: Any, *, smoothing: float = 0.0) -> ExampleScores:
    """Mean cross-entropy over the tokens that `loss_mask (B, T)` asks for, and how many are right.

    `logits (B, T, vocabulary)` at position t are of the token at t + 1. An example's share of right
    tokens is float32. Weighted by their numbers of tokens, as batches come, examples add up to the
    mean over all tokens: the loss of microsoft/LoRA's `model.py`.
    """
    following, asked = _following(batch)
    losses = cross_entropy(logits, following, smoothing=smoothing)
    right = _is_right(logits, following)
    count = jnp.maximum(asked.sum(-1), 1).astype(losses.dtype)

    def mean(values):
        counted = jnp.where(asked > 0, values, jnp.zeros_like(values))
        return counted.sum(-1).astype(losses.dtype) / count

    return ExampleScores(mean(losses), mean(right).astype(jnp.float32), None)


# Logits that are larger than this are made a part of the sequence at a time.
LARGEST_LOGITS = 256 * 2**20  # bytes of float32


def readout_tokens(
    logits_of: Callable, h_BTD: jax.Array, batch: Any, *, smoothing: float = 0.0, chunk: int = 0
) -> ExampleScores:
    """`score_tokens` of `logits_of(h_BTD)`, which are made for `chunk` positions at a time.

    `chunk=0` makes all at once where they take 256 MiB of float32 at most, and else as many
    positions at a time as do. A part's logits are made again in the backward pass, so that at no
    time there are more of them: the price is the head's product a third time. (Adapter dropout on
    the head has one mask for all parts.)
    """
    batch_size, time, _ = h_BTD.shape
    vocab = jax.eval_shape(logits_of, h_BTD[:, :1]).shape[-1]
    chunk = chunk or max(1, LARGEST_LOGITS // (4 * batch_size * vocab))
    if chunk >= time:
        return score_tokens(logits_of(h_BTD), batch, smoothing=smoothing)
    following, asked = _following(batch)
    parts = -(-time // chunk)

    def in_parts(x):  # (B, T, …) as (parts, B, chunk, …), filled up with zeros
        padded = jnp.pad(x, [(0, 0), (0, parts * chunk - time), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(batch_size, parts, chunk, *x.shape[2:]), 1, 0)

    # Only the sequence is cut: a batch split over devices stays so.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(part):
        h, tokens, wanted = part
        logits = logits_of(h)
        losses = cross_entropy(logits, tokens, smoothing=smoothing)
        right = _is_right(logits, tokens)
        counted = (jnp.where(wanted > 0, x, jnp.zeros_like(x)) for x in (losses, right))
        return tuple(x.sum(-1, dtype=like.dtype) for x, like in zip(counted, start, strict=True))

    zero = jnp.zeros(batch_size, float32_or_wider(h_BTD.dtype))
    start = (zero, jnp.zeros(batch_size, jnp.int32))

    def add(sums, part):
        return tuple(total + own for total, own in zip(sums, one(part), strict=True)), None

    (losses, right), _ = lax.scan(add, start, tuple(map(in_parts, (h_BTD, following, asked))))
    count = jnp.maximum(asked.sum(-1), 1).astype(losses.dtype)
    share = right.astype(losses.dtype) / count
    return ExampleScores(losses / count, share.astype(jnp.float32), None)


def _is_right(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    largest = jnp.argmax(logits, -1)
    return largest == tokens.astype(largest.dtype)


def _following(batch):
    """The token after each position (B, T), and whether the loss asks for it."""
    # The last position's logits are of a token that is not there; shifting the tokens, not the
    # logits, copies nothing large.
    following = jnp.roll(batch["input_ids"], -1, axis=-1)
    return following, jnp.roll(batch["loss_mask"], -1, axis=-1).at[..., -1].set(0)


@dataclasses.dataclass(frozen=True)
class Task:
    """What `model.head` means. `target` is one of `data.TARGETS`, `unit` what weights count.

    `score(logits, batch, *, smoothing=0.0) -> ExampleScores`; where there is a `readout`, the model
    is called with that, since its logits may be too many. `keeps_predictions` says that what was
    predicted goes with the test scores, since another metric than accuracy is taken of it.
    """

    target: str
    unit: str
    score: Callable[..., ExampleScores]
    keeps_predictions: bool = False
    readout: Callable[..., ExampleScores] | None = None

    def check_splits(self, splits: Splits, num_labels: Any) -> None:
        """Raises `RequestError` if a head of `num_labels` outputs does not fit the data."""
        if self.target == "class" and len(splits.label_names) != num_labels:
            names = ", ".join(map(repr, splits.label_names[:5]))
            raise RequestError(
                f"model.num_labels={num_labels}, but the data have {len(splits.label_names)} "
                f"labels ({names}); set model.num_labels to it"
            )

    def check_smoothing(self, smoothing: float) -> None:
        """Raises `RequestError` if `smoothing` is not in [0, 1), or is of a number."""
        check("train.label_smoothing", smoothing)
        if smoothing and self.target == "number":
            raise RequestError(
                f"train.label_smoothing={smoothing!r}, but numbers are not smoothed; set it to 0"
            )

    def encode(self, model: Model, examples: Examples, *, max_length: int) -> EncodedExamples:
        """The examples' token ids, as `model` reads them."""
        if self.target == "text":
            assert model.eos_token_id is not None  # `make_model` refuses one without
            return encode_completions(
                model.tokenizer, examples, max_length=max_length,
                eos_token_id=model.eos_token_id, pad_token_id=model.pad_token_id,
            )  # fmt: skip
        encoded = encode_examples(model.tokenizer, examples, max_length=max_length)
        if getattr(model.config, "type_vocab_size", 0) < 2:  # it has no embedding for a second text
            return dataclasses.replace(encoded, type_ids=None)
        return encoded


CLASSIFICATION = Task("class", "examples", score_classes)
TASKS = {
    "classification": CLASSIFICATION,
    "regression": Task("number", "examples", score_numbers),
    "causal-lm": Task("text", "tokens", score_tokens),
}


def head_of(settings: Any) -> str:
    """The head that a config's `model` section asks for; classification where it is silent.

    Raises `RequestError` for an unknown one, or a regression of other than one output.
    """
    head = check("model.head", settings.get("head") or "classification")
    num_labels = settings.get("num_labels")
    if head == "regression" and num_labels not in (None, 1):
        raise RequestError(
            f"model.num_labels={num_labels!r}, but a regression has one output; set it to 1"
        )
    return head


def task_of(settings: Any, splits: Splits | None = None) -> Task:
    """The task of a config's `model` section, for these data. Raises `RequestError`."""
    task = TASKS[head_of(settings)]
    if task.target == "text":  # of the families here, which take a readout
        task = dataclasses.replace(task, readout=readout_tokens)
    if splits is None:
        return task
    task.check_splits(splits, settings.get("num_labels"))
    return dataclasses.replace(task, keeps_predictions=bool(splits.metrics))
