"""A split of prompts and references, decoded and scored: BLEU and ROUGE-L over the corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.data import Examples, references_of
from lora_jax.data.completions import prompt_ids
from lora_jax.generate.settings import Decoding
from lora_jax.generate.text import answer_rows, pad_left
from lora_jax.models.model import Model
from lora_jax.train.text_metrics import score_texts


@dataclasses.dataclass(frozen=True)
class Questions:
    """Each distinct prompt once, in the order of the split, with all of its completions."""

    prompts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, examples: Examples, limit: int = 0) -> Questions:
        """Those of `examples`; with a `limit`, as many, evenly spread over the split.

        Raises `RequestError` for examples that have no completions.
        """
        if examples.seconds is None:
            raise RequestError("these data have labels, not texts; decode a model of completions")
        found = references_of(examples)
        prompts = list(found)
        if 0 < limit < len(prompts):
            # Neighbours share most of their properties, so the first ones would be one restaurant.
            prompts = [prompts[n * len(prompts) // limit] for n in range(limit)]
        return cls(tuple(prompts), tuple(found[prompt] for prompt in prompts))


def answer(
    model: Model,
    params: Any,
    prompts: Sequence[str],
    settings: Decoding,
    *,
    batch_size: int = 16,
    show: Callable[[int], None] | None = None,
) -> list[str]:
    """The completion of each prompt by a model trained on pairs (`data.completions`), stripped.

    A prompt ends in the end of text, as in training. `params` may be plain, merged or bound; one
    program serves all batches. `show(n)` is called with the number of prompts answered.
    """
    if (end := model.eos_token_id) is None:
        raise RequestError(
            f"model {model.name} has no end of text (eos_token_id), which separates a prompt from "
            "its completion; put it into its config.json"
        )
    rows = [prompt_ids(model.tokenizer, p, eos_token_id=end) for p in prompts]
    tokens, mask = pad_left(rows, model.pad_token_id)
    found = answer_rows(model, params, tokens, mask, settings, batch_size=batch_size, show=show)
    return [text.strip() for text in found]


def score(questions: Questions, texts: Sequence[str]) -> dict[str, Any]:
    """BLEU and ROUGE-L of one text a prompt; see `score_texts`."""
    return score_texts(texts, questions.references)
