"""Where a file's tensors go as they are read: kept as NumPy arrays, or onto the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError


class Placing(Protocol):
    """Takes tensors one by one: `dtype` says what a tensor becomes, `put` keeps one that has become
    it, `empty` and `put_part` keep layers that are stacked into one parameter.
    """

    def dtype(self, path: str, stored: np.dtype) -> np.dtype: ...

    def put(self, array: np.ndarray) -> Any: ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any: ...

    def put_part(self, stack: Any, part: np.ndarray, index: int) -> Any: ...


class OnHost:
    """NumPy arrays in the dtypes of the file."""

    def dtype(self, path: str, stored: np.dtype) -> np.dtype:
        return stored

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def put_part(self, stack: np.ndarray, part: np.ndarray, index: int) -> np.ndarray:
        stack[index] = part
        return stack


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """JAX arrays of dtype `wanted`, or the file's where it is None; `name` is the model's.

    A task's head (`has_head`) keeps the file's dtype: `make_model` widens it, nothing rounds it.
    """

    wanted: np.dtype | None
    name: str
    has_head: bool

    def dtype(self, path: str, stored: np.dtype) -> np.dtype:
        if self.has_head and path.startswith("head/"):
            return stored
        wanted = self.wanted or stored
        if wanted == np.float64 and not jax.config.jax_enable_x64:
            raise RequestError(
                f"model {self.name} in float64 needs jax.config.update('jax_enable_x64', True); "
                "or pass dtype='float32'"
            )
        return wanted

    def put(self, array: np.ndarray) -> jax.Array:
        # A copy of its own, or JAX might keep the file's memory; `jnp.array` would make two.
        return _settled(jax.device_put(array, may_alias=False))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
        return jnp.zeros(shape, dtype)

    def put_part(self, stack: jax.Array, part: np.ndarray, index: int) -> jax.Array:
        return _settled(_put_part(stack, part, index))


def _settled(placed: jax.Array) -> jax.Array:
    """`placed`, with nothing left of what it was made from."""
    placed.block_until_ready()
    # JAX lets go of a host array when it is next called, which may be after the next is read.
    jax.device_put(np.int32(0))
    return placed


# The stack is donated, so it is written where it lies: a second one would be a third of a model.
@functools.partial(jax.jit, donate_argnums=0)
def _put_part(stack: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, index, 0)
