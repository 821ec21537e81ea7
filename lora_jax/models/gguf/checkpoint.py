"""A `.gguf` file as a `Checkpoint`: what a Hugging Face folder of the same model would give."""

from __future__ import annotations

from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.io.gguf.reader import read_gguf
from lora_jax.models.checkpoint import Checkpoint, Request, change_config, eos_ids, read_params
from lora_jax.models.families import find_family
from lora_jax.models.gguf.llama import gguf_config, gguf_tensors
from lora_jax.models.tokenizer import check_tokenizer


def is_gguf(path: Path) -> bool:
    """Whether the path is a file that should be read as GGUF."""
    return path.is_file() and path.suffix == ".gguf"


def read_gguf_checkpoint(path: Path, name: str, request: Request) -> Checkpoint:
    """Reads the file, its quantised tensors expanded to float32 one by one.

    Raises `RequestError` for whatever is missing, damaged or of another architecture.
    """
    file = read_gguf(path)
    raw, place = gguf_config(file), str(path)
    family = find_family(raw["model_type"], place)
    config = change_config(family.config.from_json(raw, place), request.config_changes)
    tokenizer = None
    if request.needs_tokenizer:
        from lora_jax.models.gguf.tokenizer import gguf_tokenizer

        tokenizer = gguf_tokenizer(file)
        check_tokenizer(tokenizer, vocab_size=config.vocab_size, pad_token_id=None, place=place)
    params, head, pooling = read_params(gguf_tensors(file), family, config, request, place=place)
    if head is not None:
        raise RequestError(f"{path} holds a classifier, which GGUF files of this kind do not have")
    eos = eos_ids(config.eos_token_id)
    return Checkpoint(name, family, config, params, tokenizer, pooling, None, eos)
