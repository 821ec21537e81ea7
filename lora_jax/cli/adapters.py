"""An adapter on the command line: a run of ours, or a folder in PEFT's format with its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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


def load_adapted(
    path: str, base: str | None, *, untie: bool = False
) -> tuple[Model, Method, Any, Any]:
    """`(model, method, trainable, frozen)` of a run's cell, its adapter/ folder, or a PEFT folder.

    `base` names the base of a PEFT adapter; by default its own config does. `untie` gives the
    head of a tied base a kernel of its own. Raises `RequestError`
    for a folder that is none of them, or a `base` beside a run, which knows its own.
    """
    if is_peft(path):
        return _load_peft(path, base, untie)
    if untie:
        raise RequestError("--untie is for adapters in PEFT's format; a run knows its base")
    if base is not None:
        raise RequestError(
            f"--model={base} is for adapters in PEFT's format; the run in {path} knows its base"
        )
    from lora_jax.train import load_adapter

    folder = Path(path)
    folder = folder if (folder / "method.json").is_file() else cell_of(path) / "adapter"
    adapted = load_adapter(folder)
    return adapted.model, adapted.method, adapted.trainable, adapted.frozen


def base_of(folder: Path) -> str:
    """The base model that a PEFT folder names. Raises `RequestError` if it names none."""
    from lora_jax.formats.peft_config import check_is_peft
    from lora_jax.models.config_fields import read_json

    raw = read_json(folder / PEFT_CONFIG, kind=dict)
    check_is_peft(raw, f"{folder}/{PEFT_CONFIG}")
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(f"{folder}/{PEFT_CONFIG} names no base model; give it: --model=…")
    return base


def _base_here(folder: Path) -> str:
    """`base_of`. Raises `RequestError` if no model is there under that name."""
    from lora_jax.models.sources import embedded_names, find_source

    base = base_of(folder)
    if base not in embedded_names():
        try:
            find_source(base)
        except RequestError as error:
            raise RequestError(
                f"{folder}/{PEFT_CONFIG} names the base model {base!r}, which is not here; give "
                f"its folder: --model=… ({error})"
            ) from error
    return base


def _load_peft(path: str, base: str | None, untie: bool):
    from lora_jax.formats.peft import load_adapter
    from lora_jax.formats.peft_keys import read_keys
    from lora_jax.formats.peft_save import read_labels
    from lora_jax.models import load_model

    base = base or _base_here(Path(path))
    folder = Path(base) if Path(base).is_dir() else None
    keys = read_keys(Path(path))
    num_labels = _num_labels(Path(path), keys.whole)
    head = "classification" if num_labels or _is_classifier(folder, keys) else None
    # Neither command reads a text; where the base has a tokenizer, a merged folder gets it.
    has_none = folder is not None and not (folder / "tokenizer.json").is_file()
    model = load_model(base, head=head, num_labels=num_labels, tokenizer=not has_none, untie=untie)
    method, trainable = load_adapter(path, model)
    if model.head is not None and (labels := read_labels(Path(path), model.num_labels)):
        model = dataclasses.replace(model, labels=labels)
    return model, method, trainable, model.params


def _num_labels(folder: Path, whole: Mapping[str, Any]) -> int | None:
    """Outputs of the classifier that the adapter brings; None if it brings none."""
    from lora_jax.formats.safetensors import read_tensors
    from lora_jax.models.checkpoint import HEAD_FILE

    if (folder / HEAD_FILE).is_file():
        bias = read_tensors(folder / HEAD_FILE).get("head.bias")
        return None if bias is None else int(bias.size)
    for name in ("classifier.weight", "classifier.out_proj.weight", "score.weight"):
        if name in whole:
            return int(whole[name].shape[0])
    return None


def _is_classifier(base: Path | None, keys: Any) -> bool:
    """Whether the base's folder, or the adapter's own modules, are those of a classifier."""
    from lora_jax.models.config_fields import read_json

    if any(name.startswith(("classifier", "score")) for name in keys.parts):
        return True
    if base is None or not (base / "config.json").is_file():
        return False
    names = read_json(base / "config.json", kind=dict).get("architectures")
    return isinstance(names, list) and any("SequenceClass" in str(name) for name in names)
