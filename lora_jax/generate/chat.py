"""How a chat model was taught to see a question."""

from __future__ import annotations

from lora_jax.core.errors import RequestError
from lora_jax.models.model import Model

_BEGIN, _END = "<|im_start|>", "<|im_end|>"


def chat_prompt(model: Model, text: str) -> str:
    """`text` as a user's turn in ChatML, with the assistant's turn begun.

    The format of SmolLM2 and Qwen2, known by their two special tokens; no system turn is added.
    Raises `RequestError` if the model's tokenizer lacks them.
    """
    for token in (_BEGIN, _END):
        if model.tokenizer.token_to_id(token) is None:
            raise RequestError(
                f"model {model.name} has no chat format known here: its tokenizer lacks {token!r}; "
                "write the prompt as the model was trained to see it (without --chat)"
            )
    return f"{_BEGIN}user\n{text}{_END}\n{_BEGIN}assistant\n"
