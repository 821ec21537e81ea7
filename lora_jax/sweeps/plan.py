"""Which cells share a program: those whose shapes agree once ranks are padded within a bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.methods import LoRA
from lora_jax.sweeps.pack import Pack, make_pack
from lora_jax.sweeps.settings import CellSettings

NARROWEST_BUCKET = 8  # below it, padding a rank costs nothing that could be measured


@dataclasses.dataclass(frozen=True)
class Planned:
    """Cells that train together, and the share of their padded factors that is their own."""

    cells: tuple[CellSettings, ...]
    pack: Pack
    padding_efficiency: float

    def __str__(self) -> str:
        names = [cell.name for cell in self.cells]
        shown = ", ".join(names if len(names) <= 4 else [*names[:3], f"… {len(names) - 3} more"])
        ranks = sorted(set(self.pack.ranks.values()))
        padded = (
            f"; padded to rank {', '.join(map(str, ranks))} on {len(self.pack.ranks)} targets, "
            f"{self.padding_efficiency:.0%} of it their own"
            if ranks
            else ""
        )
        return f"{len(names)} in one program{padded}: {shown}"


def bucket_of(rank: int) -> int:
    """The width of the bucket a rank is padded in: 8, 16, 32, …, so that 1 never pays for 64.

    >>> [bucket_of(rank) for rank in (1, 8, 9, 64, 65)]
    [8, 8, 16, 64, 128]
    """
    bucket = NARROWEST_BUCKET
    while bucket < rank:
        bucket *= 2
    return bucket


def make_plan(cells: Sequence[CellSettings], params: Any) -> tuple[list[Planned], dict[str, str]]:
    """The packs, in order of their first cells, and `{name: why}` of cells that cannot be run.

    A cell whose rules do not fit `params` (a rank above the matrix, no such target) is left out;
    the others still run.
    """
    groups: dict[Any, list[CellSettings]] = {}
    refused = {}
    for cell in cells:
        if cell.refused:
            refused[cell.name] = cell.refused
            continue
        try:
            key = _what_must_agree(cell, params)
        except RequestError as error:
            refused[cell.name] = str(error)
        else:
            groups.setdefault(key, []).append(cell)
    return [plan_pack(group, params) for group in groups.values()], refused


def plan_pack(cells: Sequence[CellSettings], params: Any) -> Planned:
    """One pack of all of `cells`."""
    pack = make_pack([cell.method for cell in cells], params)
    own = sum(_num_factors(cell, params) for cell in cells)
    padded = len(cells) * sum(row.num_trainable for row in pack.union.table(params) if row.rank)
    return Planned(tuple(cells), pack, own / padded if padded else 1.0)


def _num_factors(cell: CellSettings, params) -> int:
    return sum(row.num_trainable for row in cell.method.table(params) if row.rank)


def _what_must_agree(cell: CellSettings, params):
    whole = tuple(cell.method.whole_paths(params))
    if not isinstance(cell.method, LoRA):
        return (type(cell.method).__name__, whole)
    ranks = [rule.rank for rule, _ in cell.method.adapted(params).values()]
    return ("LoRA", whole, bucket_of(max(ranks)))
