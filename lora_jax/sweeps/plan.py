"""Which cells share a program: those whose shapes agree once ranks are padded within a bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.methods import FullFineTuning
from lora_jax.sweeps.pack import Pack, is_padded, is_subspace, make_pack
from lora_jax.sweeps.settings import CellSettings

# In the place of any dimension: subspaces of all of them share a program, whose cost is what moves.
_ANY = 1
NARROWEST_BUCKET = 8  # below it, padding a rank costs nothing that could be measured


@dataclasses.dataclass(frozen=True)
class Planned:
    """Cells that may train together, their pack, and what each trains (`counts`, parameters).

    `padding_efficiency` is the share of the padded factors that is the cells' own.
    """

    cells: tuple[CellSettings, ...]
    pack: Pack
    counts: tuple[int, ...]
    padding_efficiency: float

    def take(self, places: Sequence[int]) -> Planned:
        """The same plan with these cells only."""
        cells, counts = ([of[k] for k in places] for of in (self.cells, self.counts))
        return dataclasses.replace(
            self, cells=tuple(cells), pack=self.pack.take(places), counts=tuple(counts)
        )

    def __str__(self) -> str:
        names = [cell.name for cell in self.cells]
        shown = ", ".join(names if len(names) <= 4 else [*names[:3], f"… {len(names) - 3} more"])
        ranks, widths = sorted(set(self.pack.ranks.values())), set(self.pack.widths)
        padded = (
            f"; padded to rank {', '.join(map(str, ranks))} on {len(self.pack.ranks)} "
            f"parameter{'' if len(self.pack.ranks) == 1 else 's'}, {self.padding_efficiency:.0%} "
            "of it their own"
            if ranks
            else f"; padded to {max(widths)} dimensions"
            if len(widths) > 1
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
    groups: list[_Group] = []
    refused = {}
    for cell in cells:
        if cell.refused:
            refused[cell.name] = cell.refused
            continue
        try:
            shape = _shape_of(cell, params)
        except RequestError as error:
            refused[cell.name] = str(error)
            continue
        group = next((group for group in groups if group.takes(cell, shape)), None)
        if group is None:
            groups.append(group := _Group(shape))
        group.add(cell, shape)
    return [_planned(group.cells, params) for group in groups], refused


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What decides with whom a cell may share a program: `kind` must agree, and so must the
    `roles` of each adapter that both have."""

    kind: Any
    roles: dict[str, str]


class _Group:
    def __init__(self, first: _Shape):
        self.cells: list[CellSettings] = []
        self._first, self._roles = first, dict(first.roles)

    def takes(self, cell: CellSettings, shape: _Shape) -> bool:
        if isinstance(cell.method, FullFineTuning):
            return False  # each trains a base of its own: nothing to share
        same = shape.kind == self._first.kind
        return same and all(self._roles.get(p, r) == r for p, r in shape.roles.items())

    def add(self, cell: CellSettings, shape: _Shape) -> None:
        self.cells.append(cell)
        self._roles |= shape.roles


def _shape_of(cell: CellSettings, params) -> _Shape:
    method = cell.method
    whole = tuple(method.whole_paths(params))
    if is_subspace(method):
        method.table(params)  # for its checks
        return _Shape((dataclasses.replace(method, dim=_ANY), whole), {})
    if not is_padded(method):
        # Nothing is known of other methods but that equal ones have equal programs.
        method.table(params)  # for its checks
        return _Shape(method, {})
    sites = method.sites(params)
    bucket = bucket_of(max(own.rank for own in sites.values()))
    # What is left of the method once all that may differ is gone: its type and own settings.
    own = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if field.name not in ("rules", "axes", "train", "aliases")
    }
    targets = None if "targets" in method.ZERO_PADDABLE else tuple(sites)
    kind = (type(method), own, whole, bucket, targets)
    return _Shape(kind, {name: own.roles for name, own in sites.items()})


def _planned(cells: Sequence[CellSettings], params: Any) -> Planned:
    pack = make_pack([cell.method for cell in cells], params)
    tables = [list(cell.method.table(params)) for cell in cells]
    own = sum(row.num_trainable for table in tables for row in table if row.rank)
    padded = len(cells) * sum(row.num_trainable for row in pack.union.table(params) if row.rank)
    counts = tuple(sum(row.num_trainable for row in table) for table in tables)
    return Planned(tuple(cells), pack, counts, own / padded if padded else 1.0)
