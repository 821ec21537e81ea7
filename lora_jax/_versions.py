"""Versions of what a result depends on, and the commit of this package. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import lora_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    # Not from the metadata: an editable installation keeps those of the day it was made.
    return {**found, "lora_jax": lora_jax.__version__}


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
        edited = git("status", "--porcelain", "--", str(folder))
        return git("rev-parse", "HEAD") + ("+dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LORA_JAX_COMMIT", "unknown")


def describe_version() -> str:
    """What `lora-jax --version` prints, in one line.

    >>> describe_version().split(",")[0] == f"lora_jax {lora_jax.__version__}"
    True
    """
    found, commit = versions(), git_commit()
    return ", ".join(
        [
            f"lora_jax {found['lora_jax']}",
            *([f"commit {commit}"] if commit != "unknown" else []),
            *(f"{name} {found[name]}" for name in ("jax", "jaxlib", "python")),
        ]
    )
