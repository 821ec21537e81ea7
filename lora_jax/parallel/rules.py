"""Where parameters lie on a mesh: rules by path for all families, and for adapters after them.

A kernel's inputs or its outputs are split over `tensor`, so that products of a layer need one sum
over devices (Shoeybi et al. 2019, arXiv:1909.08053): the outputs of q, k, v, gate and up, the
inputs of o and down. The other side is split over `fsdp`. An adapter follows its kernel: `a` its
input axes, `b` its output axes; a rank is never split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from lora_jax.core.axes import KernelAxes

# (path, what splits the inputs, what splits the outputs); first match wins.
_RULES = (
    (r"(.*/)?attention/(q|k|v|qkv|query|key|value)/kernel", "fsdp", "tensor"),
    (r"(.*/)?mlp/(gate|up|intermediate)/kernel", "fsdp", "tensor"),
    (r"(.*/)?(attention/(o|output)|mlp/(down|output))/kernel", "tensor", "fsdp"),
    # A table of words is looked up by its first axis; tied, it is also the head.
    (r"(embed|embeddings/word)/embedding", "tensor", "fsdp"),
    (r"head/kernel", "fsdp", "tensor"),
    (r".*/embedding", None, "fsdp"),
    (r".*/kernel", "fsdp", None),
)
_RULES_OF = tuple((re.compile(pattern), first, last) for pattern, first, last in _RULES)
# Biases of outputs that are split; the others are whole everywhere.
_SPLIT_BIASES = re.compile(
    r"(.*/)?(attention/(q|k|v|qkv|query|key|value)|mlp/(gate|up|intermediate))/bias"
)


def roles_of(path: str, ndim: int, axes: Mapping[str, KernelAxes]) -> str:
    """A letter for each axis of a parameter: "i" in, "o" out, "s" stacked (see `core/values`).

    What meets no product is a vector, and its leading axes are stacks.
    """
    if path in axes:
        return axes[path].roles(ndim, path)
    is_table = path.endswith(("/kernel", "/embedding")) and ndim >= 2
    return "s" * (ndim - 2) + "io" if is_table else "s" * (ndim - 1) + "o"[:ndim]


def spec_of(path: str, roles: str) -> tuple[str | None, ...]:
    """The mesh axis that splits each axis of a parameter; of several of one role the first."""
    if "i" in roles:
        found = next((rule for rule in _RULES_OF if rule[0].fullmatch(path)), None)
        by_role = {"i": found[1], "o": found[2]} if found else {}
    else:
        by_role = {"o": "tensor"} if _SPLIT_BIASES.fullmatch(path) else {}
    spec: list[str | None] = []
    for role in roles:
        spec.append(by_role.pop(role, None))
    return tuple(spec)


def fitted(
    spec: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh, *, elsewhere: tuple[int, ...] = ()
) -> PartitionSpec:
    """The spec, without the mesh axes that do not divide their axis of the array.

    Such a one goes to the first of the axes `elsewhere` that it divides along with what is there: a
    table of 50,257 words is split by its width.
    """
    fitting: list[tuple[str, ...]] = []
    homeless: list[str] = []
    for axis, size in zip(spec, shape, strict=True):
        names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        names = tuple(name for name in names if mesh.shape[name] > 1)
        fits = size % _places(names, mesh) == 0
        fitting.append(names if fits else ())
        homeless += [] if fits else names
    for name in homeless:
        for axis in elsewhere:
            if shape[axis] % _places((*fitting[axis], name), mesh) == 0:
                fitting[axis] = (*fitting[axis], name)
                break
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in fitting))


def _places(names: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in names)
