"""The mesh of devices: its axes by name, and how a user writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest

# cell: cells of a sweep, each its own. data: parts of a batch, the base whole on each. fsdp: parts
# of a batch, and of each weight, gathered where it is used. tensor: parts of each product.
AXES = ("cell", "data", "fsdp", "tensor")
# What the rows of a batch are split over.
BATCH = ("data", "fsdp")


def read_mesh(text: str) -> dict[str, int]:
    """`{axis: size}` of "fsdp=4,tensor=2", every axis named, the others 1.

    Raises `RequestError` for an unknown axis, one that comes twice, or a size below 1.

    >>> read_mesh("fsdp=4,tensor=2")
    {'cell': 1, 'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, is_set, size = part.partition("=")
        if name not in AXES:
            raise RequestError(f"--mesh: no axis {name!r}; {nearest(name, AXES)}")
        if name in sizes:
            raise RequestError(f"--mesh={text}: {name} comes twice")
        if not is_set or not size.isdecimal() or int(size) < 1:
            raise RequestError(f"--mesh: {part!r} is no size; write it as {name}=4")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def mesh_text(mesh: Mesh) -> str:
    """What `read_mesh` reads as this mesh: its axes above 1.

    >>> mesh_text(make_mesh({"data": len(jax.devices())}))[:4] in ("data", "")
    True
    """
    return ",".join(f"{name}={n}" for name, n in mesh.shape.items() if n > 1)


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(sizes.get(name, 1) for name in BATCH)


def without_cells(mesh: Mesh) -> Mesh:
    """The mesh for one cell alone: the devices of `cell` share its batch, as `data`."""
    cells, data, *rest = (mesh.shape[name] for name in AXES)
    return Mesh(mesh.devices.reshape(1, cells * data, *rest), AXES)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes over all `devices` (those of this machine by default).

    Raises `RequestError` where the sizes do not multiply to their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) != len(devices):
        said = " x ".join(f"{name}={n}" for name, n in zip(AXES, shape, strict=True) if n > 1)
        kind = getattr(devices[0], "device_kind", "device")
        raise RequestError(
            f"a mesh of {said or 'one device'} has {math.prod(shape)} places, and there are "
            f"{len(devices)} devices ({kind}); let the sizes multiply to {len(devices)}"
        )
    if devices[0].platform == "cpu":
        return Mesh(np.array(devices).reshape(shape), AXES)
    from jax.experimental import mesh_utils

    try:
        placed = mesh_utils.create_device_mesh(shape, devices=devices)
    except NotImplementedError:
        # Axes that are no whole rows of the slice: tensor=8 on 4x4 takes two rows.
        placed = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES)
