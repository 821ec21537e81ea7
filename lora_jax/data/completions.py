"""Prompts and completions to token ids, for a causal language model."""

from collections.abc import Callable

import numpy as np
import tokenizers

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Examples
from lora_jax.data.tokenize import CHUNK_SIZE, EncodedExamples, end_to_end


def encode_completions(
    tokenizer: tokenizers.Tokenizer,
    examples: Examples,
    *,
    max_length: int,
    eos_token_id: int,
    pad_token_id: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedExamples:
    """Encodes each pair as prompt, end of text, " " + completion, end of text.

    So microsoft/LoRA's `gpt2_encode.py` has it: the first end of text says where the completion
    begins, the second is learnt as part of it (`prompt_lengths` count the tokens up to the first,
    it included). The tokenizer adds no special tokens of its own. A pair of more than `max_length`
    tokens loses tokens from the beginning of its prompt; the completion stays whole. Raises
    `RequestError` for a completion that does not fit by itself, or for which there are no tokens.
    """
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    end = np.array([eos_token_id], np.int32)
    rows: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    for start in range(0, len(examples), CHUNK_SIZE):
        chunk = slice(start, start + CHUNK_SIZE)
        prompts = _encoded(plain, list(examples.texts[chunk]))
        completions = _encoded(plain, [f" {text}" for text in examples.seconds[chunk]])
        for place, prompt, completion in zip(
            examples.ids[chunk], prompts, completions, strict=True
        ):
            room = max_length - len(completion) - 2
            if room < 0 or not len(completion):
                raise RequestError(_unfit(place, len(completion), max_length))
            prompt = prompt[max(0, len(prompt) - room) :]
            rows.append(np.concatenate([prompt, end, completion, end]))
            prompt_lengths.append(len(prompt) + 1)
        if on_progress is not None:
            on_progress(len(rows), len(examples))
    return EncodedExamples(
        **end_to_end(rows),
        labels=examples.labels,
        pad_id=pad_token_id,
        prompt_lengths=np.array(prompt_lengths, np.int64),
    )


def prompt_ids(tokenizer: tokenizers.Tokenizer, prompt: str, *, eos_token_id: int) -> list[int]:
    """The token ids after which a model trained on `encode_completions` begins a completion."""
    return [*tokenizer.encode(prompt, add_special_tokens=False).ids, eos_token_id]


def _encoded(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in found]


def _unfit(place: str, length: int, max_length: int) -> str:
    if not length:
        return f"{place}: the tokenizer finds no tokens in the completion; remove the row"
    return (
        f"{place}: the completion has {length} tokens, which with two ends of text is more than "
        f"data.max_length={max_length}; raise it to {length + 2} or more, or shorten the text"
    )
