"""What methods share that train one vector: everything that moves lies in one random subspace.

All that trains is stored, stacked and saved as floating-point arrays; so is what says which
subspace it is: its key, and a hash of what it was made for.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.draws import KEY_IMPL, partitionable
from lora_jax.core.errors import RequestError
from lora_jax.methods.base import PROBED, Method, PyTree, Trainable
from lora_jax.methods.table import MethodTable, Row


@partitionable()
def key_numbers(key: jax.Array) -> jax.Array:
    """(4,) float32 of 16 bits each, from a key of any kind."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    return jnp.stack([words >> 16, words & 0xFFFF], axis=-1).reshape(-1).astype(jnp.float32)


def key_of(numbers: jax.Array) -> jax.Array:
    """The key that `key_numbers` wrote down; nothing has a gradient by it."""
    halves = jax.lax.stop_gradient(numbers).astype(jnp.uint32).reshape(-1, 2)
    return jax.random.wrap_key_data((halves[:, 0] << 16) | halves[:, 1], impl=KEY_IMPL)


class Subspace(Method):
    """Moves everything together by P θ, with P fixed and random: `dim` numbers train.

    Its one entry of `trainable` is called `NAME`. It holds, in float32, `theta` and what a subclass
    adds, and what does not train: `key (4,)`, which says which subspace it is, and `layout (2,)`, a
    hash of what moves. `CHOICES` names the settings that must be one of a few.
    """

    dim: int
    projection: str

    NAME: ClassVar[str]
    PROJECTIONS: ClassVar[Mapping[str, Callable[..., jax.Array]]]
    CHOICES: ClassVar[Mapping[str, Any]]
    FROZEN_PARTS: ClassVar = frozenset({"key", "layout"})
    EXCLUSIVE: ClassVar = True

    def __post_init__(self):
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise RequestError(f"dim is {self.dim!r}; it must be a whole number of 1 or more")
        for name, known in self.CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"{name} is {value!r}; {trees.nearest(str(value), known)}")

    def _sizes(self, params: PyTree, whole: frozenset[str]) -> dict[str, int]:
        """`{name: number of entries}` of what moves, in its order in P's rows."""
        raise NotImplementedError

    def _entry(self, key: jax.Array, sizes: Mapping[str, int], **parts: Any) -> Trainable:
        return {
            self.NAME: {**parts, "key": key_numbers(key), "layout": jnp.asarray(_layout(sizes))}
        }

    def _steps(self, entry: Mapping[str, jax.Array], sizes: Mapping[str, int]) -> dict[str, Any]:
        """`{name: flat (size,)}`: P θ. Raises `RequestError` for an entry made for other sizes."""
        # Under a trace its numbers are not known; what is loaded or merged is seen.
        is_known = not isinstance(entry["layout"], jax.core.Tracer)
        total = sum(sizes.values())
        if is_known and not np.array_equal(entry["layout"], _layout(sizes)):
            raise RequestError(
                f"{self.NAME!r} was made for other parameters than the {len(sizes)} that move here "
                f"({total:,} numbers); bind it to the tree it was made for"
            )
        steps = self.PROJECTIONS[self.projection](entry["theta"], total, key_of(entry["key"]))
        # Split, not sliced: the adjoint is one concatenation, where that of each slice passes over
        # all that moves (100 slices of MiniLM's 10.7 million: 1 s of a step on a CPU, not 0.1).
        return dict(zip(sizes, jax.lax.split(steps, tuple(sizes.values())), strict=True))

    def drawn(self, trainable: Trainable) -> dict[str, list[float]]:
        """The first rows of a small projection with the key."""
        entry = trainable[self.NAME]
        theta = jnp.arange(1, min(entry["theta"].shape[0], PROBED) + 1, dtype=jnp.float32)
        rows = self.PROJECTIONS[self.projection](theta, 8 * PROBED, key_of(entry["key"]))
        return {"P": rows[: 2 * PROBED].tolist()}

    def owns(self, name: str) -> bool:
        return name == self.NAME

    def table(self, params: PyTree) -> MethodTable:
        table = super().table(params)
        sizes = self._sizes(params, frozenset(self.whole_paths(params)))
        rank = getattr(self, "rank", None)
        row = Row(self.NAME, (sum(sizes.values()),), rank, None, self.dim)
        return dataclasses.replace(table, rows=(row, *table.rows))

    def mask(self, tree: PyTree) -> PyTree:
        """Raises `RequestError`: all that is bound is computed from what trains."""
        return self._mask_of(self.NAME, None)


def _layout(sizes: Mapping[str, int]) -> np.ndarray:
    # NumPy: under a trace JAX would make a number of it that is not known.
    found = zlib.crc32(repr(list(sizes.items())).encode())
    return np.array([found >> 16, found & 0xFFFF], np.float32)
