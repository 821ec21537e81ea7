"""What an adapter in PEFT's format changes, matrix by matrix, without any model's code.

A, B and the config say ΔW = s · B A of each module; the base's own files hold W under the same
names. So adapters of models that this project cannot run can be looked at, too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.trees import nearest
from lora_jax.formats.peft_config import CONFIG, PeftConfig
from lora_jax.formats.peft_keys import TENSORS, read_keys
from lora_jax.formats.safetensors import LazyTensors
from lora_jax.models.config_fields import read_json
from lora_jax.models.sources import find_adapter, find_source
from lora_jax.models.weights_files import open_weights


@dataclasses.dataclass(frozen=True)
class Factors:
    """One matrix' change: ΔW = scale · a @ b, `a (d_in, r)`, `b (r, d_out)`, as stored."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`; of a table the entries and their width."""
        return self.a.shape[0], self.b.shape[1]


@dataclasses.dataclass(frozen=True)
class AdapterFactors:
    """The matrices that an adapter changes, by their modules' names ("…layers.0.self_attn.q_proj").

    `name` tells it from others; `base` is what its config calls the base model, or "". `is_dora`:
    the columns of W + ΔW are scaled beside, which `factors` do not say. `transposed` are modules
    whose weight lies as (d_in, d_out) in the base's files.
    """

    name: str
    factors: Mapping[str, Factors]
    base: str = ""
    is_dora: bool = False
    transposed: frozenset[str] = frozenset()


def read_factors(path: str | os.PathLike, *, adapter_name: str | None = None) -> AdapterFactors:
    """Reads a folder in PEFT's format, or a hub id; `adapter_name` as in `load_adapter`.

    Raises `RequestError` for what is missing, damaged, not finite, without an adapter of a matrix,
    of other shapes than the config says, or not implemented.
    """
    folder = find_adapter(path, adapter_name)
    config, keys = PeftConfig.read(folder / CONFIG), read_keys(folder)
    raw = read_json(folder / CONFIG, kind=dict)
    found = {}
    for module, arrays in sorted(keys.parts.items(), key=_layer_order):
        place = f"{folder / TENSORS}: {module!r}"
        if missing := {"A", "B"} - arrays.keys():
            raise RequestError(f"{place} lacks its {sorted(missing)[0]}; copy the adapter again")
        a, b = arrays["A"], arrays["B"]
        if a.ndim != 2 or b.ndim != 2:
            raise RequestError(
                f"{place} has an A of {a.shape} and a B of {b.shape}: of a convolution; only "
                "matrices are analysed"
            )
        rank = config.rank_of(module)
        if not a.shape[0] == b.shape[1] == rank:
            raise RequestError(
                f"{place} has an A of {a.shape} and a B of {b.shape}, but {CONFIG} says rank "
                f"{rank}; they belong to different adapters"
            )
        scale = config.alpha_of(module) / (rank**0.5 if config.use_rslora else rank)
        found[module] = Factors(a.T, b.T, float(scale))
    if not found:
        raise RequestError(f"{folder / TENSORS} adapts no matrix; there is nothing to analyse")
    base = raw.get("base_model_name_or_path")
    return AdapterFactors(
        name=folder.name or str(folder),
        factors=found,
        base=base if isinstance(base, str) else "",
        is_dora=config.use_dora,
        transposed=_transposed(folder, found, bool(raw.get("fan_in_fan_out"))),
    )


def _layer_order(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Layer 2 before layer 10: files have them by letters."""
    return [(int(key) if key.isdecimal() else -1, key) for key in item[0].split(".")]


def _transposed(folder: Path, found: Mapping[str, Factors], all_of_them: bool) -> frozenset[str]:
    # A table's rows are looked up: its (entries, width) are its inputs and outputs. PEFT writes the
    # factors of tables under names of their own.
    tables = {
        key.removeprefix("base_model.model.").removesuffix(".lora_embedding_A")
        for key in LazyTensors(folder / TENSORS)
        if key.endswith(".lora_embedding_A")
    }
    return frozenset(found) if all_of_them else frozenset(tables)


class BaseKernels:
    """The base's weights of adapted modules, as kernels `(d_in, d_out)`, each read when asked for.

    `path` is a model's folder (one file or shards) or a hub id. Raises `RequestError` where a
    module's weight is not there or has another shape: the base is not the adapter's.
    """

    def __init__(self, path: str | os.PathLike):
        folder = find_source(path)
        if not folder.is_dir():
            raise RequestError(f"{folder} is no folder of safetensors; give the base's folder")
        self._tensors, self._file = open_weights(folder)
        self._names = set(self._tensors)

    def kernel(self, adapter: AdapterFactors, module: str) -> np.ndarray:
        """`(d_in, d_out)`, in the file's dtype."""
        factors, tensor = adapter.factors[module], self._tensor_of(module)
        weight = self._tensors[tensor]
        wanted = factors.shape if module in adapter.transposed else factors.shape[::-1]
        if weight.shape != wanted:
            raise RequestError(
                f"{self._file}: {tensor} is {weight.shape}, but {adapter.name} changes a matrix of "
                f"{wanted}; it was made for another base"
                f"{f', {adapter.base!r}' if adapter.base else ''}"
            )
        return weight if module in adapter.transposed else weight.T

    def _tensor_of(self, module: str) -> str:
        """The weight's name: heads wrap a model, so that one name may be the other's end."""
        wanted = f"{module}.weight"
        if wanted in self._names:
            return wanted
        ends = [n for n in self._names if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        if len(ends) == 1:
            return ends[0]
        several = f"; it could be {' or '.join(sorted(ends)[:3])}" if ends else ""
        near = "" if ends else f"; {nearest(wanted, sorted(self._names))}"
        raise RequestError(
            f"{self._file} has no weight of {module!r}{several}{near}; give the base that the "
            "adapter was made for"
        )
