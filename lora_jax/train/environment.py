"""What a run is made with, for its card: versions, commit, device and compiled program."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax.train.cell import Progress
from lora_jax.train.numerics import numerics
from lora_jax.train.record import Program

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "lora_jax")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def git_commit() -> str:
    """The commit of the working tree that holds this package ("+dirty" if edited).

    Where there is none, LORA_JAX_COMMIT, which a launcher sets on machines that get the files
    without their history; else "unknown".
    """
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10}
        return subprocess.run(command, check=True, **options).stdout.strip()

    try:
        # A package installed inside somebody else's repository is not at that one's commit.
        git("ls-files", "--error-unmatch", __file__)
        edited = git("status", "--porcelain", "--", str(folder.parent))
        return git("rev-parse", "HEAD") + ("+dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LORA_JAX_COMMIT", "unknown")


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
    table: Iterable[Any],
    batch_shapes: Iterable[Sequence[int]],
    *,
    memory_bytes: int,
    progress: Progress,
    pack: Mapping[str, Any] | None = None,
) -> Program:
    """What was compiled: ranks and targets, batch shapes, memory (of a device), threads, flags.

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
        batch_shapes=[list(shape) for shape in batch_shapes],
        memory_bytes=memory_bytes,
        threads=num_threads(),
        xla_flags=now["xla_flags"],
        matmul_precision=now["matmul_precision"],
        numerics=now,
        numerics_changes=list(progress.numerics_changes) or None,
    )
