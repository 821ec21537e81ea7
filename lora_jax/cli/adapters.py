"""An adapter on the command line: a run of ours, or a folder in PEFT's format with its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.cli.requests import cell_of
from lora_jax.core.errors import RequestError

if TYPE_CHECKING:
    from lora_jax.methods import Method
    from lora_jax.models import Model

PEFT_CONFIG = "adapter_config.json"


def is_peft(path: str) -> bool:
    """Whether the folder is an adapter in PEFT's format."""
    return (Path(path) / PEFT_CONFIG).is_file()


def load_adapted(path: str, base: str | None) -> tuple[Model, Method, Any, Any]:
    """`(model, method, trainable, frozen)` of a run's cell, its adapter/ folder, or a PEFT folder.

    `base` names the base of a PEFT adapter; by default its own config does. Raises `RequestError`
    for a folder that is none of them, or a `base` beside a run, which knows its own.
    """
    if is_peft(path):
        return _load_peft(path, base)
    if base is not None:
        raise RequestError(
            f"--model={base} is for adapters in PEFT's format; the run in {path} knows its base"
        )
    from lora_jax.train import load_adapter

    folder = Path(path)
    folder = folder if (folder / "method.json").is_file() else cell_of(path) / "adapter"
    adapted = load_adapter(folder)
    return adapted.model, adapted.method, adapted.trainable, adapted.frozen


def _load_peft(path: str, base: str | None):
    from lora_jax.formats.peft import load_adapter
    from lora_jax.models import load_model
    from lora_jax.models.config_fields import read_json

    raw = read_json(Path(path) / PEFT_CONFIG, kind=dict)
    base = base or raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(f"{path}/{PEFT_CONFIG} names no base model; give it: --model=…")
    head = "classification" if raw.get("task_type") == "SEQ_CLS" else None
    # Neither command reads a text; where the base has a tokenizer, a merged folder gets it.
    has_none = Path(base).is_dir() and not (Path(base) / "tokenizer.json").is_file()
    model = load_model(
        base, head=head, num_labels=_num_labels(path) if head else None, tokenizer=not has_none
    )
    method, trainable = load_adapter(path, model)
    return model, method, trainable, model.params


def _num_labels(path: str) -> int | None:
    """Outputs of the classifier that the adapter holds; None leaves it to the base's own."""
    from lora_jax.formats.peft_keys import read_keys

    for name, array in read_keys(Path(path)).whole.items():
        if name in ("classifier.weight", "classifier.out_proj.weight", "score.weight"):
            return int(array.shape[0])
    return None
