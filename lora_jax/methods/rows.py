"""Single rows of a table that train while the others stay: new tokens of an embedding.

They are bound as an adapter whose `a` picks the rows and whose `b` is their change, so a lookup, a
tied head and whatever else takes an adapter takes them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Aliases, check_each_matches, pattern_of
from lora_jax.core.values import AdaptedValue, is_adapted
from lora_jax.core.weights import LoRAWeight


def rows_name(path: str) -> str:
    """The name in `trainable` of the rows of the parameter at `path`."""
    return f"{path}[rows]"


def matching(what: str, targets: Any, params: Any, aliases: Aliases | None) -> list[str]:
    """The paths of floating-point parameters that match; `RequestError` if a member has none."""
    leaves = dict(trees.flatten(params, is_leaf=is_adapted).items())
    floats = [path for path, leaf in leaves.items() if is_adapted(leaf) or trees.is_float(leaf)]
    check_each_matches(what, targets, floats, aliases)
    pattern = pattern_of(targets, aliases)
    found = [path for path in floats if pattern.fullmatch(path)]
    if stored := [path for path in found if isinstance(leaves[path], trees.Stored)]:
        raise RequestError(
            f"{what}={targets!r} would train {stored[0]!r} ({len(stored)} of {len(found)}), which "
            "is quantised and stays as it is; train an adapter on it, or leave it out"
        )
    return found


def chosen_rows(
    rows: Mapping[str, Sequence[int]], params: Any, whole: Collection[str], aliases: Aliases | None
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """`{path: (parameter, indices)}` of the rows that train."""
    leaves = dict(trees.flatten(params, is_leaf=is_adapted).items())
    found: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for pattern, indices in rows.items():
        for path in matching("rows", pattern, params, aliases):
            if path in found:
                raise RequestError(
                    f"two entries of rows= name {path!r}; name all of its rows in one"
                )
            if path in whole:
                raise RequestError(
                    f"{path!r} is trained whole (train=) and by rows (rows=); leave it out of "
                    "one of them"
                )
            found[path] = leaves[path], _row_indices(path, leaves[path], indices)
    return found


def _row_indices(path: str, table: Any, indices: Sequence[int]) -> tuple[int, ...]:
    """The indices, checked against the table. Raises `RequestError`."""
    found = tuple(indices) if isinstance(indices, Iterable) else ()
    count = table.shape[0] if table.ndim else 0
    if table.ndim < 2 or not found or not all(isinstance(n, int | np.integer) for n in found):
        raise RequestError(
            f"rows of {path!r} {tuple(table.shape)} are {indices!r}; they must be a list of one or "
            "more row numbers of a table with two axes or more"
        )
    wrong = [n for n in found if not 0 <= n < count]
    if wrong or len(set(found)) < len(found):
        what = f"{wrong[0]} is outside of" if wrong else "one row stands twice among those of"
        raise RequestError(f"row {what} {path!r}, which has rows 0 to {count - 1}, each named once")
    return tuple(int(n) for n in found)


def init_rows(path: str, table: jax.Array, indices: Sequence[int]) -> dict[str, jax.Array]:
    """`{"rows": (n, …)}`: the rows as they are, in float32 or wider."""
    wide = float32_or_wider(table.dtype)
    return {"rows": table[jnp.asarray(indices)].astype(wide)}


def bind_rows(path: str, kernel: Any, rows: jax.Array, indices: Sequence[int]) -> AdaptedValue:
    """The table with these rows in place of its own; an adapter beneath still adds to them."""
    base = kernel.base if is_adapted(kernel) else kernel
    if isinstance(base, jax.ShapeDtypeStruct):
        raise RequestError(f"rows= of {path!r}, which is quantised and stays as it is")
    if rows.shape != (len(indices), *base.shape[1:]):
        raise RequestError(
            f"{rows_name(path)!r} holds {rows.shape}, but the method names {len(indices)} rows of "
            f"{tuple(base.shape)}; use the method that made it"
        )
    chosen = jnp.asarray(indices)
    return LoRAWeight(
        kernel=kernel,
        a=(jnp.arange(base.shape[0])[:, None] == chosen[None]).astype(rows.dtype),
        b=rows - base[chosen].astype(rows.dtype),
        scale=np.ones((), rows.dtype),
        roles="i" + "o" * (base.ndim - 1),
        path=path,
    )
