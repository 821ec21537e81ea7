"""What a run is made with, for its card: versions, device, program, and all that changes its bits.

What decides about the bits of a result, apart from config, weights and data, is recorded by
`numerics`: in a card's `program` section and in every checkpoint. Keys and draws of a training are
of a stated implementation (`core/draws.py`), so the global PRNG settings are recorded but change no
bits.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib

from lora_jax._versions import git_commit as git_commit
from lora_jax._versions import versions as versions
from lora_jax.core.errors import RequestError
from lora_jax.train.cell import Progress
from lora_jax.train.compilation import Use
from lora_jax.train.record import Program

# Settings that make another computation: a training does not go on under another value.
REFUSED = {"x64": "JAX_ENABLE_X64", "matmul_precision": "JAX_DEFAULT_MATMUL_PRECISION"}
# Those that change how it rounds: a training goes on, and its card says so.
NOTED = ("disable_jit", "disable_most_optimizations", "xla_flags", "backend", "jax", "jaxlib")


def device_description() -> dict[str, Any]:
    """What JAX runs on: platform, kind of device, how many, and the threads of the host."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "threads": num_threads(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
    }


def num_threads() -> int:
    """Processors of the host that this process may use, 0 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def cpu_name() -> str:
    """The host's processor, as Linux names it: XLA compiles for what it can do."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def describe_program(
    table: Iterable[Any], use: Use, progress: Progress, pack: Mapping[str, Any] | None = None
) -> Program:
    """What was run: ranks and targets, batch shapes, memory (of a device), threads, flags.

    `table` is a method's table (of a pack, the union's); a row without a rank is a parameter
    trained whole. `pack` has the `Program` fields of a packed cell: `K`, `slot`, `pack`, `cells`
    and `at_once`. `progress` knows the mesh, and what a resumed run found changed of `numerics`.
    """
    adapted = [row for row in table if row.rank]
    now = numerics()
    return Program(
        **(pack or {"K": 1, "slot": 0}),
        mesh=progress.mesh or None,
        ranks=sorted({row.rank for row in adapted}),
        targets=[row.path for row in adapted],
        **use.to_json(),
        threads=num_threads(),
        xla_flags=now["xla_flags"],
        matmul_precision=now["matmul_precision"],
        numerics=now,
        numerics_changes=list(progress.numerics_changes) or None,
    )


def numerics() -> dict[str, Any]:
    """The settings, flags and versions that this process computes with, as JSON values."""
    set_to = jax.config.values
    return {
        "x64": bool(set_to["jax_enable_x64"]),
        "matmul_precision": str(set_to["jax_default_matmul_precision"]),
        "disable_jit": bool(set_to["jax_disable_jit"]),
        "disable_most_optimizations": bool(set_to["jax_disable_most_optimizations"]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "prng_impl": str(set_to["jax_default_prng_impl"]),
        "threefry_partitionable": bool(set_to["jax_threefry_partitionable"]),
    }


def differences(there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{setting: (there, here)}` of what changes bits and is not as in the record `there`.

    A setting that the record lacks is not compared: it was made by an earlier version.
    """
    here = numerics()
    return {
        name: (there[name], here[name])
        for name in (*REFUSED, *NOTED)
        if name in there and there[name] != here[name]
    }


def check_resumed(there: Mapping[str, Any], place: Any) -> tuple[str, ...]:
    """What to note of a training that goes on from a checkpoint with the record `there`.

    Raises `RequestError` naming the setting where it would not be the same computation.
    """
    found = differences(there)
    for name, variable in REFUSED.items():
        if name in found:
            was, now = found[name]
            raise RequestError(
                f"{place} was written with {variable}={was}, and this process has {now}, which "
                f"changes the result; set {variable}={was} to go on, or choose another workdir"
            )
    return tuple(f"{name} was {was!r}, then {now!r}" for name, (was, now) in found.items())
