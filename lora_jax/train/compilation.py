"""Compiling: once for each batch shape, timed, and remembered on disk between runs."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
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
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


@dataclasses.dataclass
class Use:
    """What was run: bytes of the largest program (on one device), and its batches' shapes."""

    memory_bytes: int = 0
    batch_shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    def add(self, memory_bytes: int = 0, batch_shapes: Iterable[Sequence[int]] = ()) -> None:
        self.memory_bytes = max(self.memory_bytes, memory_bytes)
        self.batch_shapes |= set(map(tuple, batch_shapes))

    def to_json(self) -> dict[str, Any]:
        shapes = [list(shape) for shape in sorted(self.batch_shapes)]
        return {"memory_bytes": self.memory_bytes, "batch_shapes": shapes}


class CompiledByShape:
    """A jitted `function(state, frozen, batch)`, compiled ahead for each shape that it meets.

    What decides are the shapes of the batch and the number of lanes. `seconds` is the time spent
    compiling; `use` notes what is called, of batches of texts their shapes ([lanes,] B, T); `place`
    puts a batch, or its shapes, on a mesh.
    """

    def __init__(self, function: Any, place: Callable[[Any], Any] | None = None):
        self._function, self._place = function, place
        self._compiled: dict[Any, tuple[Any, int]] = {}
        self.seconds, self.use = 0.0, Use()

    def compiled(self, state: Any, frozen: Any, batch: Any) -> Any:
        """The program for these shapes, compiled if they were not met before."""
        return self._get(state, frozen, self._placed(batch))[0]

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        batch = self._placed(batch)
        program, num_bytes = self._get(state, frozen, batch)
        is_text = isinstance(batch, dict) and "input_ids" in batch
        self.use.add(num_bytes, [batch["input_ids"].shape] if is_text else ())
        return program(state, frozen, batch)

    def _get(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, int]:
        """The program and the bytes that it holds at once, arguments included."""
        leaves, treedef = jax.tree.flatten(batch)
        lanes = [np.shape(leaf) for leaf in jax.tree.leaves(state)[:1]]
        key = (*lanes, treedef, *((np.shape(leaf), leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            start = time.perf_counter()
            program = compile_ahead(self._function, state, frozen, batch)
            self._compiled[key] = program, memory_of(program)
            self.seconds += time.perf_counter() - start
        return self._compiled[key]

    def _placed(self, batch: Any) -> Any:
        return batch if self._place is None else self._place(batch)
