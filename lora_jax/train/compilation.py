"""Compiling: once for each batch shape, timed, and remembered on disk between runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.core.errors import RequestError


def enable_compilation_cache() -> None:
    """Lets JAX keep compiled programs on disk, unless the user has chosen a place already.

    The place is `JAX_COMPILATION_CACHE_DIR`, else `lora_jax/jax` in the user's cache folder.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "lora_jax" / "jax"))
    # JAX decides at its first compilation whether there is a cache; let it decide again.
    compilation_cache.reset_cache()


def compile_ahead(function: Any, *arguments: Any) -> Any:
    """The program of a jitted `function` for these arguments, or for their shapes.

    Raises `RequestError` where `jax_disable_jit` forbids to compile.
    """
    if jax.config.values["jax_disable_jit"]:
        raise RequestError(
            "JAX_DISABLE_JIT is on, and training compiles its step ahead of time; unset "
            "it, or take `jax.grad` of `lj.lift(apply)` yourself to debug a step"
        )
    return function.lower(*arguments).compile()


def memory_of(compiled: Any) -> int:
    """Bytes of arguments, temporaries, and results that take no argument's place (XLA's count)."""
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept


class CompiledByShape:
    """A jitted `function(state, frozen, batch)`, compiled ahead for each batch shape it meets.

    `seconds` is the time spent compiling, `shapes` the batch shapes (B, T) met so far; `place`
    puts a batch, or its shapes, on a mesh.
    """

    def __init__(self, function: Callable, place: Callable[[Any], Any] | None = None):
        self._function, self._place = function, place
        self._compiled: dict[tuple[int, ...], Callable] = {}
        self.seconds = 0.0

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return sorted(self._compiled)

    @property
    def memory_bytes(self) -> int:
        """What the largest of the programs holds at once, arguments included."""
        return max(map(memory_of, self._compiled.values()), default=0)

    def compiled(self, state: Any, frozen: Any, batch: dict[str, Any]) -> Any:
        """The program for this batch's shape, compiled if it was not met before."""
        shape = tuple(batch["input_ids"].shape)
        if shape not in self._compiled:
            start = time.perf_counter()
            placed = self._placed(batch)
            self._compiled[shape] = compile_ahead(self._function, state, frozen, placed)
            self.seconds += time.perf_counter() - start
        return self._compiled[shape]

    def __call__(self, state: Any, frozen: Any, batch: dict[str, Any]):
        return self.compiled(state, frozen, batch)(state, frozen, self._placed(batch))

    def _placed(self, batch: dict[str, Any]) -> Any:
        return batch if self._place is None else self._place(batch)
