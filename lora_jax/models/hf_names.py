"""Moving tensors between a Hugging Face file's names and layouts and this project's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.bitsandbytes import Nf4Matrix, to_tensors
from lora_jax.models.placing import Placing
from lora_jax.quant.weight import NF4Weight

_FLOATS = frozenset(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its name in the file, its path here, whether the file stores it transposed.

    `index` is the tensor's place along the first axis of a parameter that stacks layers.
    """

    tensor: str
    path: str
    is_transposed: bool = False
    index: int | None = None

    def in_file(self, array: Any) -> Any:
        """The tensor as the file has it, of the parameter's array."""
        one = array if self.index is None else array[self.index]
        return one.T if self.is_transposed else one


def linear(
    module: str, path: str, *, bias: bool = True, transposed: bool = True, weight: str = "kernel"
) -> list[Entry]:
    """The entries of a linear layer; torch's `Linear` stores (out, in), `Conv1D` (in, out)."""
    entries = [Entry(f"{module}.weight", f"{path}/{weight}", is_transposed=transposed)]
    return entries + ([Entry(f"{module}.bias", f"{path}/bias")] if bias else [])


def norm(module: str, path: str, *, bias: bool = True) -> list[Entry]:
    """The entries of a layer norm."""
    return linear(module, path, bias=bias, transposed=False, weight="scale")


def layer_entries(entries: Sequence[Entry], number: int, *, stacked: bool) -> list[Entry]:
    """The entries of layer `number`, whose paths hold "layers/{}" for "layers/NUMBER" or, where
    layers are stacked, for the one "layers"."""
    if not stacked:
        return [dataclasses.replace(e, path=e.path.format(number)) for e in entries]
    return [dataclasses.replace(e, path=e.path.replace("/{}", ""), index=number) for e in entries]


def params_from_tensors(
    tensors: Mapping[str, np.ndarray],
    entries: Sequence[Entry],
    shapes: Mapping[str, Any],
    *,
    ignored: Iterable[str],
    place: str,
    placing: Placing = Placing(),  # noqa: B008
) -> dict[str, Any]:
    """Returns `{path: array}` as `placing` keeps them, accounting for every tensor of the file.

    Tensors are asked for one by one, and each is let go before the next: with a lazy mapping only
    the result and one tensor are in memory (two of a layer where layers are stacked). `ignored` are
    regexes (full match) of tensors that are known and not needed. Raises `RequestError` listing
    what is missing, unexpected, misshapen, not a float or not finite, or for a number too large for
    its new dtype.
    """
    wanted = {entry.tensor for entry in entries}
    there = set(tensors)
    unneeded = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    missing = sorted(wanted - there)
    unexpected = sorted(n for n in there if n not in wanted and not unneeded.fullmatch(n))
    wrong: dict[str, list[str]] = {"misshapen": [], "not floating point:": []}
    wrong["with NaN or infinity:"] = []
    params: dict[str, Any] = {}
    for path, group in _by_path(entries).items():
        shape = tuple(shapes[path].shape)
        for entry in group:
            if entry.tensor not in there:
                continue
            tensor = tensors[entry.tensor]
            if (problem := _problem_of(tensor, entry, shape)) is not None:
                wrong[problem[0]].append(problem[1])
                continue
            if isinstance(tensor, Nf4Matrix):
                value = tensor.to_kernel(path, placing.dtype(path, tensor.dtype))
                tensor = value if placing.keeps else np.asarray(value.dequantize())
            else:
                # Of stacked layers the first one's dtype is that of all.
                known = params.get(path)
                dtype = placing.dtype(path, tensor.dtype) if known is None else known.dtype
                tensor = _laid_out(tensor, entry, dtype, f"{path} of {place}")
            _keep(params, path, entry, tensor, shape, placing)
    problems = [
        f"{label} {_listed(names)}"
        for label, names in {"missing": missing, "unexpected": unexpected, **wrong}.items()
        if names
    ]
    if problems:
        raise RequestError(f"{place} does not fit its config.json: {'; '.join(problems)}")
    return params


def _problem_of(tensor: Any, entry: Entry, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """The kind of problem that a tensor has, and what to say of it; None for a good one."""
    of_one = shape if entry.index is None else shape[1:]
    is_quantized = isinstance(tensor, Nf4Matrix)  # always as torch's Linear has it
    expected = of_one[::-1] if entry.is_transposed or is_quantized else of_one
    if tensor.shape != expected:
        return "misshapen", f"{entry.tensor} {tensor.shape} instead of {expected}"
    if is_quantized:
        return None
    if tensor.dtype not in _FLOATS:
        return "not floating point:", f"{entry.tensor} ({tensor.dtype})"
    return None if np.isfinite(tensor).all() else ("with NaN or infinity:", entry.tensor)


def _laid_out(tensor: np.ndarray, entry: Entry, dtype: Any, what: str) -> np.ndarray:
    """The tensor as a parameter is laid out, cast in the same go, so that no third copy is made."""
    tensor = tensor.T if entry.is_transposed else tensor
    narrows = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(tensor.dtype).max
    with np.errstate(over="ignore"):
        tensor = np.asarray(tensor, dtype=dtype, order="C")
    if narrows and not np.isfinite(tensor).all():
        raise RequestError(f"{what} does not fit into {dtype}; load it wider")
    return tensor


def _keep(params, path: str, entry: Entry, tensor: Any, shape, placing: Placing) -> None:
    """Puts a tensor, laid out and cast, into `params`, or into the stack there."""
    if entry.index is None:
        params[path] = placing.put(tensor, path)
        return
    if path not in params:
        params[path] = placing.empty(tensor, shape, path)
    params[path] = placing.put_part(params[path], tensor, entry.index)


def tensors_from_params(
    params: Mapping[str, Any], entries: Sequence[Entry]
) -> dict[str, np.ndarray]:
    """Returns `{tensor name: array}` in the file's layout, for every entry.

    A kernel in four bits becomes the tensors that bitsandbytes has of it.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, group in _by_path(entries).items():
        if isinstance(params[path], NF4Weight):
            for entry in group:
                whole = params[path]
                one = whole if entry.index is None else whole.layer(entry.index)
                tensors |= to_tensors(entry.tensor, one)
            continue
        array = np.asarray(params[path])
        tensors |= {entry.tensor: entry.in_file(array) for entry in group}
    return tensors


def _by_path(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.path, []).append(entry)
    return groups


def _listed(names: Sequence[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
