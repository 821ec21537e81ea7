"""How the roles of a kernel's axes follow a reshape."""

from __future__ import annotations

import math


def reshape_roles(old_shape, new_shape, roles) -> list[tuple[str, int]] | None:
    """Role and size of each new axis if every merged or split run of axes has one role."""
    old = [(size, role) for size, role in zip(old_shape, roles, strict=True) if size != 1]
    segments: list[tuple[str, int]] = []
    pending: list[int] = []
    product, begun = 1, 0
    for size in new_shape:
        if size == 1:
            # A new axis of size one belongs to any role; "o" puts it into b alone.
            if pending:
                pending.append(1)
            else:
                segments.append(("o", 1))
            continue
        pending.append(size)
        product *= size
        run = begun
        covered = 1
        while run < len(old) and covered < product:
            covered *= old[run][0]
            run += 1
        if covered != product:
            continue  # the new axes so far split an old one: read on
        names = {role for _, role in old[begun:run]}
        if len(names) != 1:
            return None
        (role,) = names
        segments.extend((role, size) for size in pending)
        pending, product, begun = [], 1, run
    if pending or begun != len(old):
        return None
    return segments if math.prod(size for _, size in segments) == math.prod(new_shape) else None
