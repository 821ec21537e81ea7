"""An adapter with its base: a finished run of ours, or a folder in PEFT's format."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home, cell_of
from lora_jax.io.run_adapter import DESCRIPTION
from lora_jax.models import Model, load_model
from lora_jax.models.checkpoint import HEAD_FILE
from lora_jax.models.config_fields import read_json
from lora_jax.models.sources import embedded_names, find_adapter, find_source
from lora_jax.models.sources import is_peft as is_peft
from lora_jax.train.adapted import Adapted as Adapted
from lora_jax.train.adapted import load_run_adapter

PEFT_CONFIG = "adapter_config.json"


def run_adapter(path: str | os.PathLike) -> Path | None:
    """The adapter/ folder of a run of this project; None for a PEFT folder or a hub id.

    Raises `RequestError` for a folder that holds neither an adapter nor one run.
    """
    folder = at_home(path)
    if (folder / DESCRIPTION).is_file():
        return folder
    if not folder.is_dir() or is_peft(folder):
        return None
    return cell_of(folder) / "adapter"


def load_adapter(
    path: str | os.PathLike,
    model: Model | str | os.PathLike | None = None,
    *,
    adapter_name: str | None = None,
    untie: bool = False,
) -> Adapted:
    """Loads a trained adapter and its base model, from a run of this project or from PEFT's format.

    Args:
      path: a run's `WORKDIR/cells/NAME` or its `adapter/`, a workdir with one run, a folder that
        PEFT or `save_adapter` wrote, or a hub id.
      model: the base, where it is loaded already; nothing of it is copied. For PEFT's format also a
        name, folder or hub id to load. None loads the base that the run or the adapter's config
        names.
      adapter_name: the subfolder of one of several PEFT adapters.
      untie: for PEFT's format, give the head of a tied base that is loaded here its own kernel.

    Returns:
      An `Adapted`: `params` are bound, ready for `model.apply`; `model`, `method`, `trainable` and
      `frozen` serve to merge it, or to train it further.

    Raises:
      RequestError: the folder is damaged or no adapter, its base is not found, or `model` has
        other weights than it was trained on.

    >>> import tempfile, jax, lora_jax as lj
    >>> model = lj.load_model("tiny-llama")
    >>> method = lj.LoRA(targets="q,v", rank=2, alpha=4, aliases=model.aliases, axes=model.axes)
    >>> trainable, _ = method.init(jax.random.key(0), model.params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lj.save_adapter(f"{folder}/adapter", method, trainable, model)
    ...     adapted = lj.load_adapter(f"{folder}/adapter", model)
    >>> sorted(adapted.trainable) == sorted(trainable)
    True
    """
    folder = run_adapter(path)
    if folder is None:
        return _load_peft(at_home(path), model, adapter_name, untie)
    for name, value in (("untie", untie), ("adapter_name", adapter_name)):
        if value:
            raise RequestError(f"{name} is for adapters in PEFT's format; {path} is a run")
    if model is not None and not isinstance(model, Model):
        raise RequestError(
            f"the base {str(model)!r} is for adapters in PEFT's format; the run in {path} knows "
            "its base (or give a loaded model)"
        )
    return load_run_adapter(folder, model=model)


def base_of(folder: Path) -> str:
    """The base model that a PEFT folder names. Raises `RequestError` if it names none."""
    from lora_jax.peft.config import check_is_peft

    raw = read_json(folder / PEFT_CONFIG, kind=dict)
    check_is_peft(raw, f"{folder}/{PEFT_CONFIG}")
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(f"{folder}/{PEFT_CONFIG} names no base model; give it: --model=…")
    return base


def _base_here(folder: Path) -> str:
    """`base_of`. Raises `RequestError` if no model is there under that name."""
    base = base_of(folder)
    if base not in embedded_names():
        try:
            find_source(base)
        except RequestError as error:
            raise RequestError(
                f"{folder}/{PEFT_CONFIG} names the base model {base!r}, which is not here; give "
                f"its folder (--model=…, in Python model=…): {error}"
            ) from error
    return base


def _load_peft(
    path: str | os.PathLike,
    base: Model | str | os.PathLike | None,
    adapter_name: str | None,
    untie: bool,
) -> Adapted:
    from lora_jax.peft import load as peft
    from lora_jax.peft.save import read_labels

    folder = find_adapter(path, adapter_name)
    if isinstance(base, Model) and untie:
        raise RequestError("untie is for a base that is loaded here; load_model has it, too")
    model = base if isinstance(base, Model) else _load_base(folder, base, untie)
    method, trainable = peft.load_adapter(folder, model)
    if model.head is not None and (labels := read_labels(folder, model.num_labels)):
        model = dataclasses.replace(model, labels=labels)
    return Adapted(model, method, trainable, model.params, {})


def _load_base(folder: Path, base: str | os.PathLike | None, untie: bool) -> Model:
    """The base of a PEFT folder, with a head if the adapter is of a classifier."""
    from lora_jax.peft.keys import read_keys

    base = base or _base_here(folder)
    place = at_home(base) if at_home(base).is_dir() else None
    keys = read_keys(folder)
    num_labels = _num_labels(folder, keys.whole)
    head = "classification" if num_labels or _is_classifier(place, keys) else None
    # An adapter can be merged and converted without one; where the base has it, it is read.
    has_none = place is not None and not (place / "tokenizer.json").is_file()
    return load_model(base, head=head, num_labels=num_labels, tokenizer=not has_none, untie=untie)


def _num_labels(folder: Path, whole: Mapping[str, Any]) -> int | None:
    """Outputs of the classifier that the adapter brings; None if it brings none."""
    from lora_jax.io.safetensors import read_tensors

    if (folder / HEAD_FILE).is_file():
        bias = read_tensors(folder / HEAD_FILE).get("head.bias")
        return None if bias is None else int(bias.size)
    for name in ("classifier.weight", "classifier.out_proj.weight", "score.weight"):
        if name in whole:
            return int(whole[name].shape[0])
    return None


def _is_classifier(base: Path | None, keys: Any) -> bool:
    """Whether the base's folder, or the adapter's own modules, are those of a classifier."""
    if any(name.startswith(("classifier", "score")) for name in keys.parts):
        return True
    if base is None or not (base / "config.json").is_file():
        return False
    names = read_json(base / "config.json", kind=dict).get("architectures")
    return isinstance(names, list) and any("SequenceClass" in str(name) for name in names)
