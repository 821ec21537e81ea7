"""The table of what a method trains."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained parameter: its shape, the adapter's rank and scale (None if trained whole)."""

    path: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    num_trainable: int


def in_natural_order(paths: Iterable[str]) -> list[str]:
    """Paths in their tree's order, but where that sorts keys as text, layer 2 is before layer 10.

    >>> in_natural_order(["layers/0/w", "layers/10/w", "layers/2/w"])
    ['layers/0/w', 'layers/2/w', 'layers/10/w']
    """
    children: dict[str, list[str]] = {}
    for path in paths:
        key, _, rest = path.partition("/")
        children.setdefault(key, []).append(rest)
    keys = list(children)
    if keys == sorted(keys):
        keys.sort(key=_by_number)
    return [
        f"{key}/{rest}" if rest else key
        for key in keys
        for rest in (in_natural_order(children[key]) if any(children[key]) else [""])
    ]


def _by_number(key: str) -> list[str | int]:
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", key))]


@dataclasses.dataclass(frozen=True)
class MethodTable:
    """Rows in the tree's order; `num_params` counts the whole model without its adapters.

    `skipped`: paths that the rules match and that get no adapter, since the model uses them in no
    product.
    """

    rows: tuple[Row, ...]
    num_params: int
    skipped: tuple[str, ...] = ()

    @property
    def num_trainable(self) -> int:
        return sum(row.num_trainable for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __str__(self) -> str:
        table = [("path", "shape", "rank", "scale", "trainable")]
        for row in self.rows:
            rank = "whole" if row.rank is None else str(row.rank)
            scale = "" if row.scale is None else f"{row.scale:g}"
            shape = "×".join(map(str, row.shape))
            table.append((row.path, shape, rank, scale, f"{row.num_trainable:,}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                f"{cell:{'<' if n < 2 else '>'}{widths[n]}}" for n, cell in enumerate(line)
            ).rstrip()
            for line in table
        ]
        share = self.num_trainable / max(self.num_params, 1)
        lines.append(
            f"{self.num_trainable:,} trainable parameters next to {self.num_params:,} ({share:.3%})"
        )
        if self.skipped:
            lines.append(f"no adapter, since in no product: {', '.join(self.skipped)}")
        return "\n".join(lines)
