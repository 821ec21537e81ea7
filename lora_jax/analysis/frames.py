"""Results of this folder as pandas DataFrames; pandas is imported when one is made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax._public import needs_extra
from lora_jax.analysis.adapters import Pair, PairProfile
from lora_jax.analysis.profiles import MatrixProfile
from lora_jax.core.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd


def to_frame(results: Any, **columns: Any) -> pd.DataFrame:
    """A DataFrame of what this package returned, a row per matrix.

    Args:
      results: one of
        a list of `MatrixProfile`, as `profile_adapter` returns;
        `{adapter: list of MatrixProfile}`, which get a column `adapter`;
        a `Pair`, or several, as `compare_adapters` and `compare_all` return: φ of the first
        directions (`input_first`, `output_first`) and of all (`input_all`, `output_all`), each with
        the mean of random spaces (`…_expected`);
        a named tuple of arrays (`Amplification`, `SharedDirections`, `Intruders`, `Dimension`): a
        row per place of the stack, arrays that have one axis more as lists.
      **columns: constant columns to put first, such as `seed=0`.

    Returns:
      The DataFrame. Shapes are `inputs` and `outputs`; singular values stay arrays (`s`); numbers
      that need the base are columns only where it was known.

    Raises:
      RequestError: results of another kind.
      ModuleNotFoundError: pandas is not installed; the message names the extra.

    >>> from lora_jax.analysis.profiles import profile_adapter
    >>> from lora_jax.peft.factors import AdapterFactors, Factors
    >>> one = Factors(np.eye(4)[:, :2], np.eye(2), 1.0)
    >>> frame = to_frame(profile_adapter(AdapterFactors("mine", {"w": one})), seed=0)
    >>> frame[["seed", "matrix", "rank", "stable_rank"]].values.tolist()
    [[0, 'w', 2, 2.0]]
    """
    return _pandas().DataFrame([{**columns, **row} for row in _rows(results)])


def similarity_frame(phi: Any, *, dimension: int | None = None) -> pd.DataFrame:
    """A grid φ(i, j) as rows `i`, `j`, `phi`, and with `dimension` `expected`, max(i, j) / d.

    Args:
      phi: `(r1, r2)`, as `subspace_similarity` returns it or `PairProfile.input` has it.
      dimension: d of the space that both lie in.

    Raises:
      RequestError: not two axes.
      ModuleNotFoundError: pandas is not installed; the message names the extra.

    >>> similarity_frame(np.ones((1, 2)), dimension=4).values.tolist()
    [[1.0, 1.0, 1.0, 0.25], [1.0, 2.0, 1.0, 0.5]]
    """
    grid = np.asarray(phi)
    if grid.ndim != 2:
        raise RequestError(f"φ has the shape {grid.shape}; give one grid (r1, r2)")
    i, j = (index.reshape(-1) + 1 for index in np.indices(grid.shape))
    data = {"i": i, "j": j, "phi": grid.reshape(-1)}
    if dimension is not None:
        data["expected"] = np.maximum(i, j) / dimension
    return _pandas().DataFrame(data)


def _rows(results: Any) -> Iterable[dict[str, Any]]:
    if isinstance(results, Mapping):
        return [
            {"adapter": name, **row} for name, own in results.items() for row in _rows(list(own))
        ]
    if isinstance(results, Pair):
        return [_pair_row(results, profile) for profile in results.profiles]
    if isinstance(results, tuple) and hasattr(results, "_fields"):
        return _stack_rows(results)
    if isinstance(results, list | tuple):
        if all(isinstance(one, MatrixProfile) for one in results):
            return [_matrix_row(one) for one in results]
        if all(isinstance(one, Pair) for one in results):
            return itertools.chain.from_iterable(map(_rows, results))
    raise RequestError(
        f"got {type(results).__name__}; give what profile_adapter, compare_adapters or compare_all "
        "returned, or a named tuple of this package"
    )


def _matrix_row(profile: MatrixProfile) -> dict[str, Any]:
    fields = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}
    inputs, outputs = fields.pop("shape")
    row = {"matrix": fields.pop("module"), "inputs": inputs, "outputs": outputs}
    row |= {"rank": fields.pop("rank"), "delta_norm": profile.delta_norm}
    table7 = fields.pop("amplification")
    fields.pop("kernel_similarity")  # a grid: `similarity_frame`
    row |= {name: value for name, value in fields.items() if value is not None}
    return row | ({} if table7 is None else table7._asdict())


def _pair_row(pair: Pair, profile: PairProfile) -> dict[str, Any]:
    row: dict[str, Any] = {"first": pair.first, "second": pair.second, "matrix": profile.module}
    row["inputs"], row["outputs"] = profile.shape
    row["first_rank"], row["second_rank"] = profile.ranks
    last = min(profile.ranks) - 1
    nulls = (profile.expected, profile.expected_output)
    for place, (side, null) in enumerate(zip(("input", "output"), nulls, strict=True)):
        grid = getattr(profile, side)
        row[f"{side}_first"], row[f"{side}_first_expected"] = grid[0, 0], null[0, 0]
        row[f"{side}_all"], row[f"{side}_all_expected"] = grid[last, last], null[last, last]
        row[f"{side}_shared"] = profile.shared[place]
        row[f"{side}_shared_above"] = profile.shared_above[place]
    return row | {"random_highest_first": profile.highest[0, 0]}


def _stack_rows(results: Any) -> list[dict[str, Any]]:
    """A row per place of the stack that all fields have in common."""
    arrays = {name: np.asarray(value) for name, value in results._asdict().items()}
    stack = min((array.shape for array in arrays.values()), key=len)
    return [
        {f"stack_{axis}": place for axis, place in enumerate(places)}
        | {name: _plain(array[places]) for name, array in arrays.items()}
        for places in np.ndindex(stack)
    ]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        line = needs_extra(error) or str(error)
        raise ModuleNotFoundError(f"lora_jax.analysis: {line}", name=error.name) from error
    return pandas
