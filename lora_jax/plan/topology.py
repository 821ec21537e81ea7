"""TPU slices by name: their chips, what XLA may use of them, what it says where that is too little.

Nothing of this needs a TPU; `libtpu` is XLA's compiler for them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest

# What XLA's compiler may use of a chip's memory (libtpu 0.0.42 says it where a program does not
# fit), and what Google states of it: bfloat16 FLOP/s and bytes/s of its memory
# (cloud.google.com/tpu/docs/v5e, v5p, v6e).
GIB = 2**30
CHIPS: Mapping[str, tuple[float, float, float]] = {
    "v5e": (15.75 * GIB, 197e12, 0.819e12),
    "v5p": (95.74 * GIB, 459e12, 2.765e12),
    "v6e": (31.25 * GIB, 918e12, 1.64e12),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Slices in their order of size.
SLICES: Mapping[str, tuple[str, ...]] = {
    "v5e": _FLAT,
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": _FLAT,
}
_OUT_OF_MEMORY = re.compile(
    r"(?:total memory required[^(]*\(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of).*?"
    r"(?:available HBM \(([\d.]+)([KMGT]?)\)|([\d.]+)([KMGT]?) hbm)",
    re.DOTALL,
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def describe_topology(name: str) -> Any:
    """The devices of a TPU slice such as "v5p:4x4x8", which need not be there.

    Raises `RequestError` for an unknown kind or layout, or where `libtpu` is missing.
    """
    from jax.experimental import topologies

    kind, _, layout = name.partition(":")
    if kind not in CHIPS:
        raise RequestError(f"--topology={name}: no kind {kind!r}; {nearest(kind, CHIPS)}")
    if not re.fullmatch(r"\d+(x\d+){1,2}", layout):
        raise RequestError(
            f"--topology={name}: write the layout in chips, as {kind}:{SLICES[kind][2]}; "
            f"{nearest(layout, SLICES[kind])}"
        )
    # Several plans may be compiled at once, and none asks a cloud's server what it runs on.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Else it complains that it finds no TPU here; the name that it is given decides.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    # Slices smaller than a host are described with the chips that their host has.
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if chips_of(name) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **one_chip)
    except Exception as error:  # noqa: BLE001 - XLA's errors share no class of their own
        text = " ".join(str(error).split())
        if "not installed" in text or "libtpu" in text.lower():
            raise RequestError(
                f"a plan for {name} needs XLA's compiler for TPUs, which is not here; install it: "
                f"pip install 'jax[tpu]' ({text[:120]})"
            ) from error
        raise RequestError(
            f"--topology={name} is no slice that XLA knows ({text[:160]}); "
            f"{nearest(layout, SLICES[kind])}"
        ) from error


def chips_of(topology: str) -> int:
    """How many chips a topology names. Raises `RequestError` where it names no layout."""
    layout = topology.partition(":")[2]
    if not re.fullmatch(r"\d+(x\d+){1,2}", layout):
        raise RequestError(f"--topology={topology}: write it as v5p:4x4x8, kind and chips")
    return math.prod(int(n) for n in layout.split("x"))


def needed_bytes(text: str) -> int:
    """What XLA wanted. Raises `RequestError` for an error of another kind."""
    if "RESOURCE_EXHAUSTED" not in text:
        raise RequestError(f"XLA could not compile the step: {' '.join(text.split())[:400]}")
    found = _OUT_OF_MEMORY.search(text)
    if found is None:
        return 0
    number, unit = found.group(1, 2) if found[1] else found.group(3, 4)
    return int(float(number) * _UNITS[unit])
