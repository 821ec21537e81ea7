"""Moving tensors between a Hugging Face file's names and layouts and this project's."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.core.errors import RequestError

_FLOATS = frozenset(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its name in the file, its path here, whether the file stores it transposed."""

    tensor: str
    path: str
    is_transposed: bool = False


def params_from_tensors(
    tensors: Mapping[str, np.ndarray],
    entries: Sequence[Entry],
    shapes: Mapping[str, Any],
    *,
    ignored: Iterable[str],
    place: str,
) -> dict[str, np.ndarray]:
    """Returns `{path: array}`, accounting for every tensor of the file.

    `ignored` are regexes (full match) of tensors that are known and not needed. Raises
    `RequestError` listing what is missing, unexpected, misshapen, not a float, or not finite.
    """
    wanted = {entry.tensor: entry for entry in entries}
    unneeded = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    problems = []
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        problems.append("missing " + _listed(missing))
    unexpected = [n for n in tensors if n not in wanted and not unneeded.fullmatch(n)]
    if unexpected:
        problems.append("unexpected " + _listed(sorted(unexpected)))
    params, misshapen, not_float, not_finite = {}, [], [], []
    for name, entry in wanted.items():
        if name not in tensors:
            continue
        tensor, shape = tensors[name], tuple(shapes[entry.path].shape)
        expected = shape[::-1] if entry.is_transposed else shape
        if tensor.shape != expected:
            misshapen.append(f"{name} {tensor.shape} instead of {expected}")
        elif tensor.dtype not in _FLOATS:
            not_float.append(f"{name} ({tensor.dtype})")
        elif not np.isfinite(tensor).all():
            not_finite.append(name)
        params[entry.path] = tensor.T if entry.is_transposed else tensor
    for label, names in (
        ("misshapen", misshapen),
        ("not floating point:", not_float),
        ("with NaN or infinity:", not_finite),
    ):
        if names:
            problems.append(f"{label} {_listed(names)}")
    if problems:
        raise RequestError(f"{place} does not fit its config.json: {'; '.join(problems)}")
    return params


def tensors_from_params(
    params: Mapping[str, Any], entries: Sequence[Entry]
) -> dict[str, np.ndarray]:
    """Returns `{tensor name: array}` in the file's layout, for every entry."""
    arrays = {entry: np.asarray(params[entry.path]) for entry in entries}
    return {e.tensor: array.T if e.is_transposed else array for e, array in arrays.items()}


def _listed(names: Sequence[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
