"""A kernel with its first axis, whatever its role, as a stack axis: for a scan along it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax.core.values import is_adapted


def along_first_axis(value: Any) -> Any:
    """The value with its first axis as a stack axis; plain arrays pass.

    What holds that axis (A along the inputs, B and a gain along the outputs) is cut with it, and
    the rest is there whole for each index: ΔW[n] = scale · a[n] @ b.
    """
    if not is_adapted(value):
        return value

    def leading(name, x):
        axes = value.side_axes(name)
        if 0 in axes:
            return jnp.moveaxis(x, axes.index(0), 0)
        return jnp.broadcast_to(jnp.asarray(x), (value.shape[0], *x.shape))

    return dataclasses.replace(
        value,
        kernel=along_first_axis(value.kernel),
        roles="s" + value.current_roles[1:],
        **{name: leading(name, x) for name, x in value.sides().items()},
    )
