"""Where a file's tensors go as they are read: kept as NumPy arrays, onto the device, or there in
four bits."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.rules import check_each_matches, pattern_of
from lora_jax.quant.quantize import to_nf4
from lora_jax.quant.weight import NF4Weight, encode_kernel


class Placing:
    """Takes tensors one by one, here as NumPy arrays in the dtypes of the file.

    `dtype` says what a tensor becomes, `put` keeps one that has become it, `empty` and `put_part`
    keep layers that are stacked into one parameter. Where it `keeps` what a file has in four bits,
    `put` and `put_part` take such kernels, too.
    """

    keeps = False

    def of(self, aliases: Mapping[str, Any], paths: Sequence[str]) -> Placing:
        """The same for a model of these aliases and paths."""
        return self

    def dtype(self, path: str, stored: np.dtype) -> np.dtype:
        return stored

    def put(self, array: Any, path: str) -> Any:
        return array

    def empty(self, like: Any, shape: tuple[int, ...], path: str) -> Any:
        return np.zeros(shape, like.dtype)

    def put_part(self, stack: Any, part: Any, index: int) -> Any:
        stack[index] = part
        return stack


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which kernels are quantised as they are read, and how: see `quant.quantize`."""

    targets: str | Sequence[str] = "all-linear"
    double_quant: bool = True


@dataclasses.dataclass(frozen=True)
class OnDevice(Placing):
    """JAX arrays of dtype `wanted`, or the file's where it is None; `name` is the model's.

    A task's head (`has_head`) keeps the file's dtype: `make_model` widens it, nothing rounds it.
    With `quantization` the kernels that it names are kept in four bits, quantised one by one.
    `sharding_of(path, array)` is of many devices; without it all is on one.
    """

    wanted: np.dtype | None
    name: str
    has_head: bool
    quantization: Quantization | None = None
    sharding_of: Callable[[str, Any], Any] | None = None
    pattern: re.Pattern[str] | None = None

    keeps = True

    def of(self, aliases: Mapping[str, Any], paths: Sequence[str]) -> OnDevice:
        """The same for a model of these aliases and paths. Raises `RequestError` for targets that
        name none of them."""
        if self.quantization is None:
            return self
        targets = self.quantization.targets
        check_each_matches("quantize_targets", targets, paths, aliases)
        pattern = pattern_of(targets, aliases)
        for path in paths:
            if path.endswith("/embedding") and pattern.fullmatch(path):
                raise RequestError(
                    f"quantize_targets={targets!r} name {path!r}, a table of lookups, which no "
                    "file format keeps in four bits; name kernels, as all-linear does"
                )
        return dataclasses.replace(self, pattern=pattern)

    def dtype(self, path: str, stored: np.dtype) -> np.dtype:
        if self.has_head and path.startswith("head/"):
            return stored
        wanted = self.wanted or stored
        if wanted == np.float64 and not jax.config.read("jax_enable_x64"):
            raise RequestError(
                f"model {self.name} in float64 needs jax.config.update('jax_enable_x64', True); "
                "or pass dtype='float32'"
            )
        return wanted

    def put(self, array: Any, path: str) -> Any:
        if isinstance(array, NF4Weight):
            if self.quantization is not None:
                raise RequestError(
                    f"model {self.name} is quantised already ({path!r}); load it without quantize"
                )
            return _settled(jax.device_put(array, self._where(array, path)))
        # A copy of its own, or JAX might keep the file's memory; `jnp.array` would make two.
        if (how := self._quantizes(array, path)) is None:
            return _settled(jax.device_put(array, self._where(array, path), may_alias=False))
        value = to_nf4(array, "io", path, double_quant=how.double_quant)
        return _settled(jax.device_put(value, self._where(value, path)))

    def empty(self, like: Any, shape: tuple[int, ...], path: str) -> Any:
        if isinstance(like, NF4Weight):
            double_quant = like.mean is not None
        elif (how := self._quantizes(like, path)) is not None:
            double_quant = how.double_quant
        else:
            stack = jax.ShapeDtypeStruct(shape, like.dtype)
            return jnp.zeros(shape, like.dtype, device=self._where(stack, path))
        stack = jax.eval_shape(
            lambda x: encode_kernel(x, "sio", path, double_quant=double_quant),
            jax.ShapeDtypeStruct(shape, like.dtype),
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stack)
        return jax.device_put(zeros, self._where(stack, path))

    def put_part(self, stack: Any, part: Any, index: int) -> Any:
        if isinstance(part, NF4Weight) and not isinstance(stack, NF4Weight):
            raise _uneven(self.name, part.path)
        if isinstance(stack, NF4Weight):
            if not isinstance(part, NF4Weight) and not self._quantizes(part, stack.path):
                raise _uneven(self.name, stack.path)
            part = self.put(part, stack.path)
            if (part.mean is None) != (stack.mean is None):
                raise _uneven(self.name, stack.path)
            part = dataclasses.replace(part, path=stack.path, roles=stack.roles)
        return _settled(_put_part(stack, part, index))

    def _where(self, array: Any, path: str) -> Any:
        return None if self.sharding_of is None else self.sharding_of(path, array)

    def _quantizes(self, array: Any, path: str) -> Quantization | None:
        """How the array at `path` is quantized; None where it is not."""
        named = self.pattern is not None and self.pattern.fullmatch(path)
        return self.quantization if named and array.ndim == 2 else None


def _uneven(name: str, path: str) -> RequestError:
    return RequestError(
        f"model {name} has {path!r} in four bits in some layers and otherwise in others, which one "
        "stack cannot hold; load it without scan_layers"
    )


def _settled(placed: Any) -> Any:
    """`placed`, with nothing left of what it was made from."""
    jax.block_until_ready(placed)
    # JAX lets go of a host array when it is next called, which may be after the next is read.
    jax.device_put(np.int32(0))
    return placed


# The stack is donated, so it is written where it lies: a second one would be a third of a model.
@functools.partial(jax.jit, donate_argnums=0)
def _put_part(stack: Any, part: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, index, 0), stack, part
    )
