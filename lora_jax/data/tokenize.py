"""Texts to token ids, kept in memory as one ragged array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Examples
from lora_jax.models.tokenizer import encoding_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Encodings are far larger than the ids taken from them, so only this many live at a time.
CHUNK_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class EncodedExamples:
    """Token ids of N examples, end to end.

    `ids` (total tokens,) int32; `offsets` (N + 1,) int64, so that example i is
    `ids[offsets[i]:offsets[i + 1]]`; `labels` (N,) as in `Examples`; `pad_id` fills batches. Of two
    texts, `type_ids` (total tokens,) int32 says which each token is of (None: of one, or the
    tokenizer does not tell); of completions, `prompt_lengths` (N,) int64 are the tokens before.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int
    type_ids: np.ndarray | None = None
    prompt_lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (N,) int64."""
        return np.diff(self.offsets)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of example `index`, (length,) int32."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: np.ndarray) -> EncodedExamples:
        """The examples `rows` (M,) int64, in that order."""
        parts = [np.arange(int(self.offsets[n]), int(self.offsets[n + 1])) for n in rows]
        tokens = np.concatenate([np.zeros(0, np.int64), *parts])
        own = {name: getattr(self, name) for name in ("type_ids", "prompt_lengths")}
        return dataclasses.replace(
            self,
            ids=self.ids[tokens],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            labels=self.labels[rows],
            type_ids=None if own["type_ids"] is None else own["type_ids"][tokens],
            prompt_lengths=None if own["prompt_lengths"] is None else own["prompt_lengths"][rows],
        )


def encode_examples(
    tokenizer: Tokenizer,
    examples: Examples,
    *,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedExamples:
    """Encodes each text with the special tokens, cut to `max_length` tokens, those included.

    Of two texts the longer one is cut first. The tokenizer is left as it was. `on_progress(done,
    total)` is called now and then. Raises `RequestError` if `max_length` leaves no room for text,
    or a text gives no tokens.
    """
    seconds = examples.seconds
    special = tokenizer.num_special_tokens_to_add(is_pair=seconds is not None)
    if max_length <= special:
        raise RequestError(
            f"data.max_length={max_length} leaves no room for text: the tokenizer adds {special} "
            f"special tokens; give {special + 1} or more"
        )
    from tokenizers import Tokenizer

    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.no_padding()
    cutting.enable_truncation(max_length)
    texts: Sequence = examples.texts
    if seconds is not None:
        texts = list(zip(examples.texts, seconds, strict=True))
    rows: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for start in range(0, len(examples), CHUNK_SIZE):
        with encoding_errors():
            encoded = cutting.encode_batch_fast(list(texts[start : start + CHUNK_SIZE]))
        rows += [np.array(e.ids, np.int32) for e in encoded]
        if seconds is not None:
            types += [np.array(e.type_ids, np.int32) for e in encoded]
        if on_progress is not None:
            on_progress(len(rows), len(examples))
    lengths = np.array([len(row) for row in rows], np.int64)
    if not lengths.all():
        empty = int(np.argmin(lengths))
        raise RequestError(
            f"{examples.ids[empty]}: the tokenizer finds no tokens in {examples.texts[empty]!r}; "
            "remove the row"
        )
    type_ids = np.concatenate([np.zeros(0, np.int32), *types])
    return EncodedExamples(
        **end_to_end(rows),
        labels=examples.labels,
        pad_id=_pad_id(tokenizer),
        type_ids=type_ids if type_ids.any() else None,
    )


def end_to_end(rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of ids of any lengths as `ids` and `offsets` of `EncodedExamples`."""
    lengths = np.array([len(row) for row in rows], np.int64)
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *rows]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }


def _pad_id(tokenizer: Tokenizer) -> int:
    """The padding token's id; 0 where there is none, since padding is masked anyway."""
    if tokenizer.padding is not None:
        return tokenizer.padding["pad_id"]
    for token in ("[PAD]", "<pad>", "<|pad|>"):
        if (number := tokenizer.token_to_id(token)) is not None:
            return number
    return 0
