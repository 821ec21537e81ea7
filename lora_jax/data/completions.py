"""Prompts and completions to token ids, for a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Examples
from lora_jax.data.tokenize import CHUNK_SIZE, EncodedExamples, end_to_end
from lora_jax.models.tokenizer import encoding_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What runs record of how their completions were encoded. The first format (no record) had neither
# BOS nor the rule on leading spaces.
COMPLETION_FORMAT = 2


def encode_completions(
    tokenizer: Tokenizer,
    examples: Examples,
    *,
    max_length: int,
    eos_token_id: int,
    pad_token_id: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedExamples:
    """Encodes each pair as BOS, prompt, end of text, " " + completion, end of text.

    So microsoft/LoRA's `gpt2_encode.py` has it: the first end of text says where the completion
    begins, the second is learnt as part of it (`prompt_lengths` count the tokens up to the first,
    it included). BOS is what the tokenizer itself puts before a text (`special_prefix`; GPT-2 and
    SmolLM2: nothing); it is part of the prompt, so it is not scored. A tokenizer that puts a space
    before each text gets no second one. A pair of more than `max_length` tokens loses tokens from
    the beginning of its prompt, after BOS; the completion stays whole. Raises `RequestError` for a
    completion that does not fit by itself, or for which there are no tokens.
    """
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    end = np.array([eos_token_id], np.int32)
    begin = np.array(special_prefix(plain), np.int32)
    space = "" if doubles_leading_space(plain) else " "
    assert examples.seconds is not None  # a completion per prompt
    rows: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    for start in range(0, len(examples), CHUNK_SIZE):
        chunk = slice(start, start + CHUNK_SIZE)
        prompts = _encoded(plain, list(examples.texts[chunk]))
        completions = _encoded(plain, [f"{space}{text}" for text in examples.seconds[chunk]])
        for place, prompt, completion in zip(
            examples.ids[chunk], prompts, completions, strict=True
        ):
            special = len(begin) + 2
            room = max_length - len(completion) - special
            if room < 0 or not len(completion):
                raise RequestError(_unfit(place, len(completion), special, max_length))
            prompt = prompt[max(0, len(prompt) - room) :]
            rows.append(np.concatenate([begin, prompt, end, completion, end]))
            prompt_lengths.append(len(begin) + len(prompt) + 1)
        if on_progress is not None:
            on_progress(len(rows), len(examples))
    return EncodedExamples(
        **end_to_end(rows),
        labels=examples.labels,
        pad_id=pad_token_id,
        prompt_lengths=np.array(prompt_lengths, np.int64),
    )


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, eos_token_id: int) -> list[int]:
    """The token ids after which a model trained on `encode_completions` begins a completion."""
    with encoding_errors():
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return [*special_prefix(tokenizer), *ids, eos_token_id]


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens (BOS) that the tokenizer puts before a text, as transformers calls it."""
    # The text separates the special tokens before it from those after it, so it must have a
    # token: "a" has none in some small vocabularies.
    for text in _words(tokenizer):
        with encoding_errors():
            encoded = tokenizer.encode(text)
        if 0 in encoded.special_tokens_mask:
            before = encoded.special_tokens_mask.index(0)
            # An encoder's [CLS], to be read by its head, begins no text that goes on.
            return [encoded.ids[n] for n in range(before) if encoded.tokens[n] != "[CLS]"]
    return []


def _words(tokenizer: Tokenizer) -> Iterator[str]:
    yield "a"  # which nearly always serves: the vocabulary is long
    yield from sorted(tokenizer.get_vocab(with_added_tokens=False))


def doubles_leading_space(tokenizer: Tokenizer) -> bool:
    """Whether " a" becomes "▁▁a", since the tokenizer puts a space of its own before each text."""
    alone, spaced = (_before_the_model(tokenizer, text) for text in ("a", " a"))
    return alone.startswith("▁") and spaced == "▁" + alone


def differs_from_first_format(tokenizer: Tokenizer) -> bool:
    """Whether `COMPLETION_FORMAT` gives other ids than the first format did."""
    return bool(special_prefix(tokenizer)) or doubles_leading_space(tokenizer)


def _before_the_model(tokenizer: Tokenizer, text: str) -> str:
    """The text as the tokenizer's vocabulary sees it."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return text
    return "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    with encoding_errors():
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in found]


def _unfit(place: str, length: int, special: int, max_length: int) -> str:
    if not length:
        return f"{place}: the tokenizer finds no tokens in the completion; remove the row"
    return (
        f"{place}: the completion has {length} tokens, which with {special} special tokens is "
        f"more than data.max_length={max_length}; raise it to {length + special} or more, or "
        "shorten the text"
    )
