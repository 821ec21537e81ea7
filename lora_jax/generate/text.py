"""`generate_text`: prompts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.generate.run import Generated, generate_tokens
from lora_jax.generate.settings import Decoding
from lora_jax.models.model import Model
from lora_jax.models.tokenizer import encoding_errors


def generate_text(
    model: Model,
    params: Any,
    prompts: Sequence[str],
    settings: Decoding = Decoding(64),  # noqa: B008 (it is frozen)
    *,
    key: jax.Array | None = None,
    batch_size: int = 16,
    show: Callable[[int], None] | None = None,
) -> list[str]:
    """Continues texts with a language model: `lj.generate(model, params, ["The mill is"])`.

    The prompts are padded on the left to one width and decoded by one compiled program, which
    serves every set of parameters. `generate_tokens` is the same for token ids.

    Args:
      model: a causal language model of `load_model`, with its tokenizer.
      params: its parameters: plain, merged, or bound (`Adapted.params`, `method.bind(…)`).
      prompts: N texts.
      settings: how to decode; greedy by default, up to 64 tokens.
      key: what samples are drawn with, needed with `do_sample`; what a prompt draws depends on it
        and on the place in `prompts`, not on `batch_size`.
      batch_size: prompts decoded at once.
      show: called after each batch with the number of prompts answered.

    Returns:
      The answers without the prompts and without special tokens, in order, `settings.num_return`
      for each prompt.

    Raises:
      RequestError: no prompt, an empty one, a model without a language model's head or a
        tokenizer, more tokens than a model with learned positions has, or no key to draw with.

    >>> from lora_jax.models import load_model
    >>> model = load_model("tiny-llama")
    >>> len(generate_text(model, model.params, ["a lovely", "film"], Decoding(4)))
    2
    """
    tokens, mask = encode_prompts(model, prompts)
    return answer_rows(
        model, params, tokens, mask, settings, key=key, batch_size=batch_size, show=show
    )


def answer_rows(
    model: Model,
    params: Any,
    tokens: np.ndarray,
    mask: np.ndarray,
    settings: Decoding,
    *,
    key: jax.Array | None = None,
    batch_size: int = 16,
    show: Callable[[int], None] | None = None,
) -> list[str]:
    """`generate_text` for prompts that are token ids (B, T) already, as `pad_left` gives them."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RequestError(f"batch_size={batch_size!r} must be a whole number of at least 1")
    texts: list[str] = []
    for own, _ in answer_batches(
        model, params, tokens, mask, settings, key=key, batch_size=batch_size
    ):
        texts += own
        if show is not None:
            show(len(texts) // settings.num_return)
    return texts


def answer_batches(
    model: Model,
    params: Any,
    tokens: np.ndarray,
    mask: np.ndarray,
    settings: Decoding,
    *,
    key: jax.Array | None,
    batch_size: int,
) -> Iterator[tuple[list[str], int]]:
    """`(texts, number of their tokens)` of one batch of prompts after another."""
    batch_size = min(batch_size, len(tokens))
    for start in range(0, len(tokens), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(tokens)))
        # The last batch is filled up, so that it has the shape of the others.
        rows = np.resize(chosen, batch_size)
        numbers = (rows[:, None] * settings.num_return + np.arange(settings.num_return)).reshape(-1)
        found = generate_tokens(
            model, params, tokens[rows], mask[rows], settings, key=key, row_numbers=numbers
        )
        count = len(chosen) * settings.num_return
        yield decode_texts(model, found)[:count], int(np.asarray(found.lengths)[:count].sum())


def encode_prompts(model: Model, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, attention_mask)` (B, T) int32, padded on the left to the longest prompt.

    Raises `RequestError` if there is no prompt, or one has no token to continue.
    """
    if isinstance(prompts, str) or not prompts:
        raise RequestError(f"prompts are {prompts!r}; give a list with at least one text")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise RequestError(f"prompt {place} is {prompt!r}; prompts are texts")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt {place} is {prompt!r}, which is not UTF-8") from error
    with encoding_errors():
        encoded = [e.ids for e in model.tokenizer.encode_batch(list(prompts))]
    for place, ids in enumerate(encoded):
        if not ids:
            raise RequestError(f"prompt {place} is {prompts[place]!r}: nothing to continue")
    return pad_left(encoded, model.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, attention_mask)` (B, T) int32 of token ids, padded to the longest row.

    >>> pad_left([[5], [6, 7]], 0)[0].tolist()
    [[0, 5], [6, 7]]
    """
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), pad_token_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = 1
    return tokens, mask


def decode_texts(model: Model, generated: Generated) -> list[str]:
    """The text of each row, without padding and special tokens."""
    tokens, lengths = np.asarray(generated.tokens), np.asarray(generated.lengths)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    return model.tokenizer.decode_batch(rows, skip_special_tokens=True)
