"""Writing an adapter in PEFT's format, so that it means the same there as here."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import Stored
from lora_jax.io.atomic import atomic_folder, write_json
from lora_jax.io.safetensors import read_metadata, write_tensors
from lora_jax.methods import Method
from lora_jax.models.checkpoint import HEAD_ENTRIES, HEAD_FILE
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.functional import flatten
from lora_jax.models.hf_names import tensors_from_params
from lora_jax.models.model import Model
from lora_jax.peft.assemble import cast
from lora_jax.peft.config import CONFIG, PeftConfig
from lora_jax.peft.keys import PREFIX, TENSORS
from lora_jax.peft.names import CONV1D, EMBEDDING, Names, View
from lora_jax.peft.split import POOLED_HEAD, Written, split

# Of the weights that an adapter was trained on; readers that do not know it pass it over.
_BASE_KEY = "lora_jax.base"
# The names of a head's outputs, as JSON: adapter_config.json has no field for them.
_LABELS_KEY = "lora_jax.labels"
# That a head is in a file of its own.
HEAD_KEY = "lora_jax.head"
# PEFT stores the frozen table with an adapter of these.
_STORED_TABLES = ("embed_tokens", "lm_head")


def save_adapter(
    path: str | os.PathLike,
    method: Method,
    trainable: Mapping[str, Mapping[str, Any]],
    model: Model,
    *,
    plain: bool = False,
    dtype: Any = None,
) -> None:
    """Writes an adapter as a new folder in PEFT's format, atomically; PEFT 0.21 reads it.

    What can be said: LoRA and its variants whose change is a @ b (PiSSA as the difference from its
    start, of rank 2r), rsLoRA and DoRA; whole parameters as `modules_to_save` or `bias`; slices of
    a fused kernel as one adapter of it. Ranks and scales that differ are written as anchored
    patterns that do not overlap, since PEFT sorts patterns and takes the first that matches.

    Args:
      path: the folder to write; it must not exist yet.
      method: the method that trained the adapter.
      trainable: `{path: {part: array}}`, as `method.init` gave it and training changed it.
      model: the base, whose names and shapes the files are written for.
      plain: write what readers of `r` and `lora_alpha` alone understand: alpha = r everywhere, the
        scale in B, ranks padded with zeros.
      dtype: of the factors; float32 by default.

    A head on sentence-transformers' pooling, which PEFT has no class for, is written to
    head.safetensors. The names of a head's outputs are in the metadata ("lora_jax.labels").

    Raises:
      RequestError: PEFT's format cannot say it, `path` exists, or the disk cannot take it.
    """
    names = Names.of(model)
    written = split(method, trainable, model, names)
    if plain:
        written = written.plain()
    flat = flatten(model.params)
    tensors = _factors(written, dtype)
    tensors |= _whole(written, trainable, names, flat)
    tensors |= _tables(written, names, flat)
    config = _config(written, names, model, method)
    with atomic_folder(path) as temporary:
        write_json(temporary / CONFIG, config)
        # As a reader will read it: what our own reader cannot is never left behind.
        PeftConfig.read(temporary / CONFIG)
        metadata = {"format": "pt", _BASE_KEY: f"{_dtype_of(model)}:{model.body_hash}"}
        metadata |= {HEAD_KEY: HEAD_FILE} if written.has_pooled_head else {}
        if model.head is not None and model.labels is not None:
            metadata[_LABELS_KEY] = json.dumps(dict(model.labels), sort_keys=True)
        write_tensors(temporary / TENSORS, tensors, metadata=metadata)
        if written.has_pooled_head:
            own = {path: trainable.get(path, {}).get("value", flat[path]) for path in POOLED_HEAD}
            write_tensors(temporary / HEAD_FILE, tensors_from_params(own, HEAD_ENTRIES))


def read_labels(folder: Path, num_labels: int | None) -> dict[str, Any] | None:
    """The names of a head's outputs as `save_adapter` wrote them; None where it wrote none that
    fit `num_labels`."""
    text = read_metadata(folder / TENSORS).get(_LABELS_KEY, "null")
    try:
        labels = json.loads(text)
        names = labels["id2label"]
        fits = set(names) == {str(n) for n in range(num_labels or 0)}
        return labels if fits and all(isinstance(x, str) for x in names.values()) else None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def check_base(path: Path, model: Model) -> None:
    """Raises `RequestError` if the file says that it was trained on other weights than `model`'s.

    Files of other programs do not say, and a base in another dtype cannot be compared.
    """
    said = read_metadata(path).get(_BASE_KEY, "") if path.is_file() else ""
    dtype, _, base_hash = said.partition(":")
    if not base_hash or dtype != _dtype_of(model):
        return
    own = model.body_hash
    if base_hash != own:
        raise RequestError(
            f"{path} was trained on other weights than model {model.name} has (hash "
            f"{base_hash[:12]}, here {own[:12]}); load the model it was trained on"
        )


def _dtype_of(model: Model) -> str:
    flat = flatten(model.params)
    return str(next(x.dtype for p, x in flat.items() if not re.fullmatch(model.head_pattern, p)))


def _factors(written: Written, dtype: Any) -> dict[str, np.ndarray]:
    tensors = {}
    for name, one in written.adapters.items():
        is_table = one.module.kind == EMBEDDING
        tables = ("lora_embedding_A", "lora_embedding_B")
        name_a, name_b = tables if is_table else ("lora_A.weight", "lora_B.weight")
        parts: dict[str, np.ndarray] = {name_a: one.a.T, name_b: one.b.T}
        if one.magnitude is not None:
            parts["lora_magnitude_vector"] = one.magnitude
        for suffix, array in parts.items():
            array = cast(array, array.dtype if dtype is None else dtype, f"{suffix} of {name!r}")
            tensors[f"{PREFIX}{name}.{suffix}"] = array
    return tensors


def _whole(written: Written, trainable, names: Names, flat) -> dict[str, np.ndarray]:
    """Modules saved whole with all of their parameters, and biases."""
    tensors = {}
    for name in (*written.biases, *written.saved):
        entry = names.tensors[name]
        value = trainable.get(entry.path, {}).get("value", flat[entry.path])
        module = name.rpartition(".")[0]
        if module in written.adapters:
            name = f"{module}.base_layer.bias"
        tensors[f"{PREFIX}{name}"] = entry.in_file(np.asarray(value))
    return tensors


def _tables(written: Written, names: Names, flat) -> dict[str, np.ndarray]:
    tensors = {}
    for name in written.adapters:
        if name.rpartition(".")[2] in _STORED_TABLES:
            entry = names.modules[name].entry
            table = flat[entry.path]
            table = np.asarray(table.dequantize() if isinstance(table, Stored) else table)
            tensors[f"{PREFIX}{name}.base_layer.weight"] = entry.in_file(table)
    return tensors


def _config(written: Written, names: Names, model: Model, method: Method) -> dict[str, Any]:
    pairs = {name: (one.rank, one.alpha) for name, one in written.adapters.items()}
    rank = Counter(r for r, _ in pairs.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in pairs.values()).most_common(1)[0][0]
    kinds = {one.module.kind for one in written.adapters.values()} - {EMBEDDING}
    if model.kind == CAUSAL_LM:
        task = "CAUSAL_LM" if model.head is None else "SEQ_CLS"
    else:
        task = "SEQ_CLS" if any(m.is_output for m in names.modules.values()) else None
    if any(names.modules[name].is_output for name in written.adapters):
        # For SEQ_CLS, PEFT would put the head aside and leave its adapter out.
        task = "CAUSAL_LM" if task == "CAUSAL_LM" else "FEATURE_EXTRACTION"
    modules_to_save = list(written.modules_to_save)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": model.name,
        "task_type": task or "FEATURE_EXTRACTION",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": written.dropout,
        "target_modules": _target_modules(written.adapters, names),
        "modules_to_save": modules_to_save or None,
        "bias": written.bias,
        "fan_in_fan_out": kinds == {CONV1D},
        "init_lora_weights": True,
        "use_rslora": written.use_rslora,
        "use_dora": written.use_dora,
        "rank_pattern": {_anchored(n): r for n, (r, _) in pairs.items() if r != rank},
        "alpha_pattern": {_anchored(n): _number(a) for n, (_, a) in pairs.items() if a != alpha},
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _anchored(name: str) -> str:
    """A pattern of this module alone, in whatever order patterns are tried."""
    return f"^{re.escape(name)}"


def _target_modules(adapters: Mapping[str, Any], names: Names) -> list[str]:
    """Short names ("q_proj") where they mean just these modules, else whole names."""
    short = sorted({name.rpartition(".")[2] for name in adapters})
    whole = sorted(adapters)
    for listed in (short, whole):
        config = PeftConfig(r=1, lora_alpha=1, target_modules=tuple(listed))
        meant = names.targeted(config, View("", ""))
        meant += [
            name for name in names.phantoms if config.targets(name, is_linear=True, is_output=False)
        ]
        if set(meant) == set(adapters):
            return listed
    raise RequestError(
        f"no target_modules of PEFT mean just {_first_names(whole)}: another module's name ends in "
        "one of theirs"
    )


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
