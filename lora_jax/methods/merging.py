"""Bound trees as plain arrays (W + ΔW), and what rounding them to 16 bits loses of ΔW."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.values import is_adapted, is_bound

STORED = "stored"


def merged(bound: Any, dtype: Any = None) -> Any:
    """A bound tree with every adapted value as the plain array it stands for.

    Args:
      bound: a tree as `Method.bind` gives it.
      dtype: of the adapted and of the quantised parameters; None keeps each adapted parameter's
        own. A quantised one needs a `dtype`; "stored" is the one it had before, which the model
        computes in. The other leaves are returned as they are.

    Returns:
      The tree of plain arrays; each sum is made in float32 or wider and rounded once.

    Raises:
      RequestError: if a quantised parameter gets no dtype, a kernel or `dtype` is no floating-point
        type, or a merged parameter holds NaN or infinity.
    """
    dtype = checked_dtype(dtype)
    flat = trees.flatten(bound, is_leaf=is_adapted)
    for path, leaf in flat.items():
        if is_adapted(leaf) and leaf.is_stored and dtype is None:
            raise RequestError(
                f"{path!r} is quantised: merged with it, the parameters take their full size "
                "again, so say in which dtype: dtype=jnp.bfloat16; or merge_and_requantize"
            )
        if is_adapted(leaf) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise RequestError(
                f"{path!r} holds {leaf.dtype}, which W + ΔW cannot be rounded to; merge into the "
                "floating-point base and convert the result"
            )
    leaves = []
    for path, leaf in flat.items():
        if not is_adapted(leaf):
            leaves.append(leaf)
            continue
        own = leaf.dtype if dtype is None or dtype == STORED else dtype
        is_same = own == leaf.dtype and not leaf.is_stored
        array = leaf.materialise() if is_same else leaf.expanded(own)
        check_finite(path, array)
        leaves.append(array)
    return flat.unflatten(leaves)


def checked_dtype(dtype: Any) -> Any:
    """`dtype` of a merge as JAX names it; None and "stored" as they are. Raises `RequestError`."""
    if dtype is None or (isinstance(dtype, str) and dtype == STORED):
        return dtype
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise RequestError(
            f"dtype is {dtype!r}; give a floating-point type: jnp.float32"
        ) from error
    if not jnp.issubdtype(found, jnp.floating):
        raise RequestError(f"dtype is {found}; W + ΔW needs a floating-point type: jnp.float32")
    return found


def check_finite(path: str, array: Any) -> None:
    """Raises `RequestError` if a merged parameter holds NaN or infinity (not under a trace)."""
    if isinstance(array, jax.core.Tracer):
        return
    bad = int(array.size - jnp.isfinite(array).sum())
    if bad:
        raise RequestError(
            f"merged into {array.dtype}, {bad:,} of the {array.size:,} numbers of {path!r} are NaN "
            f"or infinite (the largest {array.dtype} is {float(jnp.finfo(array.dtype).max):.4g}); "
            "merge into float32, or check alpha and the adapter's factors"
        )


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding a merged parameter to its dtype does to its ΔW.

    `lost`: ‖rounded − (W + ΔW)‖_F / ‖ΔW‖_F, 0 where ΔW is zero; `unchanged`: the share of entries
    that round to what W alone rounds to; `dtype` of the merged parameter.
    """

    lost: float
    unchanged: float
    dtype: str


def rounding_of(bound: Any, params: Any, paths: Iterable[str] | None = None) -> dict[str, Rounding]:
    """What a merge into 16 bits or fewer lost, `{path: Rounding}`, for plain adapted kernels.

    Args:
      bound: the bound tree that was merged.
      params: what the merge gave.
      paths: those to look at; by default all.

    Returns:
      One entry per adapted parameter that is stored in 16 bits or fewer in `params` and not
      quantised in `bound` (see `quant.merge_error` for those).
    """
    after = dict(trees.flatten(params).items())
    found = {}
    for path, leaf in trees.flatten(bound, is_leaf=is_adapted).items():
        is_plain = is_bound(leaf) and not leaf.is_stored
        if not is_plain or (paths is not None and path not in paths):
            continue
        if jnp.dtype(after[path].dtype).itemsize <= 2:
            found[path] = _rounding(leaf, after[path])
    return found


def _rounding(leaf: Any, rounded: jax.Array) -> Rounding:
    whole = np.asarray(leaf.expanded(jnp.float32), np.float64)
    base = leaf.base_array().astype(jnp.float32)
    change = float(np.linalg.norm((whole - np.asarray(base, np.float64)).ravel()))
    error = float(np.linalg.norm((np.asarray(rounded.astype(jnp.float32)) - whole).ravel()))
    same = float(jnp.mean(rounded == base.astype(rounded.dtype)))
    return Rounding(error / change if change else 0.0, same, str(rounded.dtype))


def say_rounding(found: Mapping[str, Rounding]) -> str:
    """One line about the parameter that lost most, and about all."""
    worst = max(found, key=lambda path: found[path].lost)
    same = float(np.mean([one.unchanged for one in found.values()]))
    return (
        f"{len(found)} adapted kernels rounded to {found[worst].dtype}: that loses up to "
        f"{found[worst].lost:.2g} of ‖ΔW‖ ({worst}) and leaves {same:.0%} of their entries as "
        "in the base; --dtype=float32 keeps the change"
    )
