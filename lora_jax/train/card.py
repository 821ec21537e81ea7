"""The card of a finished run: what was asked, on what it ran, and what came out."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax.formats.untrusted import COUNT, NUMBER, check_fields
from lora_jax.train.numerics import numerics
from lora_jax.train.workdir import read_json_file

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "lora_jax")

RESTORE = "restore it, or remove the cell's folder to train it again"
# What this project's own code reads off a card; the rest is for people.
_READ: Mapping[str, Any] = {
    "config": dict, "config_hash": str, "base_hash": str, "data_hash": str, "counts.adapter": COUNT,
    "counts.head": COUNT, "metrics.steps": COUNT, "metrics.stopped": str,
    "metrics.adapter_bytes": COUNT, "metrics.validation.loss": NUMBER, "metrics.test.loss": NUMBER,
    "metrics.test.accuracy": NUMBER, "?metrics.weights_sha256": str, "config.model": dict,
}  # fmt: skip


def read_card(path: str | os.PathLike) -> dict[str, Any]:
    """The card in the file at `path`. Raises `RequestError` for what is no card."""
    card = read_json_file(path)
    check_fields(card, _READ, path, RESTORE)
    return card


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
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # A package installed inside somebody else's repository is not at that one's commit.
        git("ls-files", "--error-unmatch", __file__)
        commit = git("rev-parse", "HEAD")
        return (
            f"{commit}+dirty" if git("status", "--porcelain", "--", str(folder.parent)) else commit
        )
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
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def describe_program(
    table: Iterable[Any],
    batch_shapes: Sequence[Sequence[int]],
    *,
    memory_bytes: int,
    pack: Mapping[str, Any] | None = None,
    mesh: str = "",
    numerics_changes: Sequence[str] = (),
) -> dict[str, Any]:
    """What was compiled: ranks and targets, batch shapes, memory (of a device), threads, flags.

    `table` is a method's table (of a pack, the union's); a row without a rank is a parameter
    trained whole. `pack` says of a packed cell: `K`, `slot`, `pack` (its name), `cells` (by
    slot), `at_once` (cells computed side by side, 0: all). `mesh` is as `--mesh` has it;
    `numerics_changes` what a resumed run found changed of `numerics`.
    """
    adapted = [row for row in table if row.rank]
    return {
        **(pack or {"K": 1, "slot": 0}),
        **({"mesh": mesh} if mesh else {}),
        "ranks": sorted({row.rank for row in adapted}),
        "targets": [row.path for row in adapted],
        "batch_shapes": [list(shape) for shape in batch_shapes],
        "memory_bytes": memory_bytes,
        "threads": num_threads(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "numerics": numerics(),
        **({"numerics_changes": list(numerics_changes)} if numerics_changes else {}),
    }


def make_card(*, config_file: str = "", **parts: Any) -> dict[str, Any]:
    """The card from its parts, with versions, commit and time added.

    `config_file` is the config as `--config=` had it, "FILE.py[:arg]"; the card names it where it
    is known, so that the run's command can be printed. It is no setting and not hashed.

    Raises `TypeError` for a gap.
    """
    wanted = {
        "config", "config_hash", "base_hash", "data_hash", "seeds", "device", "program", "counts",
        "seconds", "metrics",
    }  # fmt: skip
    if wanted != parts.keys():
        raise TypeError(f"a card needs {sorted(wanted)}, got {sorted(parts)}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    named = {"config_file": config_file} if config_file else {}
    return {**parts, **named, "versions": versions(), "commit": git_commit(), "finished": now}
