"""Which axes a reshape merges and splits."""

from __future__ import annotations

import math


def matched_runs(old, new) -> list[tuple[list[int], list[int]]] | None:
    """The shortest runs of axes, of the `old` shape and the `new`, that hold the same numbers.

    Axes of size one are in none. None where the shapes hold different numbers, or nothing.

    >>> matched_runs((6, 4), (2, 3, 1, 4))
    [([0], [0, 1]), ([1], [3])]
    """
    if math.prod(old) != math.prod(new) or not math.prod(old):
        return None
    old_axes, new_axes = ([n for n, size in enumerate(x) if size != 1] for x in (old, new))
    runs = []
    while old_axes:
        mine, theirs = [old_axes.pop(0)], [new_axes.pop(0)]
        covered, size = old[mine[0]], new[theirs[0]]
        while covered != size:
            if covered < size:
                mine.append(old_axes.pop(0))
                covered *= old[mine[-1]]
            else:
                theirs.append(new_axes.pop(0))
                size *= new[theirs[-1]]
        runs.append((mine, theirs))
    return runs


def reshape_roles(old, new, roles) -> str | None:
    """The role of each new axis, if every merged or split run of axes has one role."""
    runs = matched_runs(old, new)
    if runs is None or any(len({roles[n] for n in mine}) > 1 for mine, _ in runs):
        return None
    # A new axis of size one belongs to any role; "o" puts it into b alone.
    found = ["o"] * len(new)
    for mine, theirs in runs:
        for n in range(theirs[0], theirs[-1] + 1):
            found[n] = roles[mine[0]]
    return "".join(found)
