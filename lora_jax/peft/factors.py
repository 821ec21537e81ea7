"""What an adapter in PEFT's format changes, matrix by matrix, without any model's code.

A, B and the config say ΔW = s · B A of each module; the base's own files hold W under the same
names. So adapters of models that this project cannot run can be looked at, too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.models.config_fields import read_json
from lora_jax.models.sources import find_adapter, find_source
from lora_jax.models.weights_files import open_weights
from lora_jax.peft.config import CONFIG, PeftConfig
from lora_jax.peft.keys import TENSORS, read_keys


@dataclasses.dataclass(frozen=True)
class Factors:
    """One matrix' change: ΔW = scale · a @ b, `a (d_in, r)`, `b (r, d_out)`, as stored.

    DoRA's: `magnitude (d_out,)`, the norms that it gives the columns of W + ΔW, as stored; or
    `gain (d_out,)`, by which it scales them, where W is known: then `b` is scaled already.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    gain: np.ndarray | None = None

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
    the columns of W + ΔW are scaled as well, which `factors` do not say. `tables` are the modules
    whose rows are looked up; `fan_in_fan_out` is the config's word on how the weights of the others
    lie, which PEFT sets by the last module it wraps. `skipped` are adapted modules that are no
    matrices.
    """

    name: str
    factors: Mapping[str, Factors]
    base: str = ""
    is_dora: bool = False
    tables: frozenset[str] = frozenset()
    fan_in_fan_out: bool = False
    skipped: tuple[str, ...] = ()


def read_factors(path: str | os.PathLike, *, adapter_name: str | None = None) -> AdapterFactors:
    """Reads a folder in PEFT's format, or a hub id; `adapter_name` as in `load_adapter`.

    Raises `RequestError` for what is missing, damaged, not finite, without an adapter of a matrix,
    of other shapes than the config says, or not implemented.
    """
    folder = find_adapter(path, adapter_name)
    config = PeftConfig.read(folder / CONFIG, with_parameters=True)
    keys = read_keys(folder)
    config.warn_of_idle_keys(list(keys.parts))
    raw = read_json(folder / CONFIG, kind=dict)
    found, skipped = {}, []
    for module, arrays in sorted(keys.parts.items(), key=layer_order):
        place = f"{folder / TENSORS}: {plain_text(module)!r}"
        if missing := {"A", "B"} - arrays.keys():
            raise RequestError(f"{place} lacks its {sorted(missing)[0]}; copy the adapter again")
        rank = config.rank_of(module)
        pieces = _matrices(place, arrays["A"], arrays["B"], rank, config.has_parameters)
        if pieces is None:
            skipped.append(plain_text(module))
            continue
        scale = config.alpha_of(module) / (rank**0.5 if config.use_rslora else rank)
        for number, (a, b) in enumerate(pieces):
            name = plain_text(module) + (f"[{number}]" if len(pieces) > 1 else "")
            found[name] = Factors(a, b, float(scale), arrays.get("magnitude"))
    if not found:
        what = f" ({len(skipped)} convolutions are not analysed)" if skipped else ""
        raise RequestError(f"{folder / TENSORS} adapts no matrix{what}; there is nothing to do")
    base = raw.get("base_model_name_or_path")
    return AdapterFactors(
        name=plain_text(folder.name or str(folder)),
        factors=found,
        base=plain_text(base) if isinstance(base, str) else "",
        is_dora=config.use_dora,
        tables=frozenset(map(plain_text, keys.tables)) & found.keys(),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        skipped=tuple(skipped),
    )


def _matrices(
    place: str, a: np.ndarray, b: np.ndarray, rank: int, has_parameters: bool
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """`(a, b)` of each matrix of a module: one, or as many as it has experts.

    Experts are A (E, r, in) and B (E, out, r), or as PEFT has those of `target_parameters`: A
    (E·r, in) by experts, B (out, r·E) by ranks. None for a convolution. Raises `RequestError`.
    """
    if a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2] == rank:
        return [(one.T, other.T) for one, other in zip(a, b, strict=True)]
    if a.ndim != 2 or b.ndim != 2:
        return None
    if a.shape[0] == b.shape[1] == rank:
        return [(a.T, b.T)]
    if has_parameters and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0:
        return [
            (a[n * rank : (n + 1) * rank].T, b[:, n :: a.shape[0] // rank].T)
            for n in range(a.shape[0] // rank)
        ]
    raise RequestError(
        f"{place} has an A of {a.shape} and a B of {b.shape}, but {CONFIG} says rank {rank}; they "
        "belong to different adapters"
    )


def plain_text(text: str) -> str:
    """A name from a stranger's file, fit for a terminal and any encoding: no control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def layer_order(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Layer 2 before layer 10: files have them by letters."""
    return [
        (int(key) if key.isdecimal() and len(key) < 9 else -1, key) for key in item[0].split(".")
    ]


# transformers' models whose blocks are made of Conv1D, with (in, out) weights, and its names there.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "c_fc", "c_proj", "q_attn")
# What a head without a weight of its own is tied to.
_HEAD = "lm_head"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class BaseKernels:
    """The base's weights of adapted modules, as kernels `(d_in, d_out)`, each read when asked for.

    `path` is a model's folder (one file or shards) or a hub id. Raises `RequestError` where a
    module's weight is not there or has another shape (the base is not the adapter's), is quantised,
    or is not finite.
    """

    def __init__(self, path: str | os.PathLike):
        folder = find_source(path)
        if not folder.is_dir():
            raise RequestError(f"{folder} is no folder of safetensors; give the base's folder")
        self._tensors, self._file = open_weights(folder)
        self._names = set(self._tensors)
        place = folder / "config.json"
        self._kind = read_json(place, kind=dict).get("model_type") if place.is_file() else None

    def kernel(self, adapter: AdapterFactors, module: str) -> np.ndarray:
        """`(d_in, d_out)`, in the file's dtype."""
        shape = adapter.factors[module].shape
        tensor = self._tensor_of(module)
        weight = self._tensors[tensor]
        if weight.dtype.name not in _FLOATS:
            raise RequestError(
                f"{self._file}: {tensor} holds {weight.dtype}, so the base is quantised; give the "
                "folder of the model before that"
            )
        if weight.shape not in (shape, shape[::-1]):
            raise RequestError(
                f"{self._file}: {tensor} is {weight.shape}, but {adapter.name} changes a matrix of "
                f"{shape[0]} inputs and {shape[1]} outputs; it was made for another base"
                f"{f', {adapter.base!r}' if adapter.base else ''}"
            )
        if not np.isfinite(weight).all():
            raise RequestError(f"{self._file}: {tensor} holds NaN or infinity; copy it again")
        return weight if self._is_as_stored(adapter, module, weight) else weight.T

    def _is_as_stored(self, adapter: AdapterFactors, module: str, weight: np.ndarray) -> bool:
        """Whether the weight lies as (d_in, d_out): tables and Conv1D, not Linear."""
        shape = adapter.factors[module].shape
        if module in adapter.tables:
            return True
        if shape[0] != shape[1]:
            return weight.shape == shape
        if self._kind is None:
            return adapter.fan_in_fan_out
        is_named = module.rpartition(".")[2] in _CONV1D_NAMES
        return self._kind in _CONV1D_MODELS and is_named

    def _tensor_of(self, module: str) -> str:
        """The weight's name: heads wrap a model, so that one name may be the other's end."""
        wanted = f"{module}.weight"
        if wanted in self._names:
            return wanted
        ends = [n for n in self._names if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        if not ends and module.rpartition(".")[2] == _HEAD:
            ends = [n for n in self._names if n.endswith(_EMBEDDINGS)]
        if len(ends) == 1:
            return ends[0]
        several = f"; it could be {' or '.join(sorted(ends)[:3])}" if ends else ""
        near = "" if ends else f"; {nearest(wanted, sorted(self._names))}"
        raise RequestError(
            f"{self._file} has no weight of {module!r}{several}{near}; give the base that the "
            "adapter was made for"
        )
