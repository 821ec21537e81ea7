"""What decides about the bits of a result besides config, weights and data, recorded in one place.

The record stands in a card's `program` section and in every checkpoint. Keys and draws of a
training are of a stated implementation (`core/draws.py`), so the global PRNG settings are recorded
but change no bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib

from lora_jax.core.errors import RequestError

# Settings that make another computation: a training does not go on under another value.
REFUSED = {"x64": "JAX_ENABLE_X64", "matmul_precision": "JAX_DEFAULT_MATMUL_PRECISION"}
# Those that change how it rounds: a training goes on, and its card says so.
NOTED = ("disable_jit", "disable_most_optimizations", "xla_flags", "backend", "jax", "jaxlib")


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
