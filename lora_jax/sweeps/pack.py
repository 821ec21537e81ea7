"""A pack: cells whose adapters may differ in rank, targets and scale, bound by one method.

The parts of an adapter are padded with zeros to the widest rank of the pack, and a target that a
cell does not use has zeros for all. Zeros stay zeros: the gradient of a padded column of `a` passes
through the padded row of `b`, which is zero, and the other way round; Adam and weight decay of zero
are zero. The scale is that of the true rank, and data, like the dropout rate.

Random subspaces of several dimensions lie in the widest: a cell's θ is padded with zeros, too, and
what lies beyond its own d is cut off where it is used, so that it has no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from lora_jax.core.axes import KernelAxes
from lora_jax.methods import IntrinsicDimension, LoRA, Method
from lora_jax.methods.base import PyTree, Trainable
from lora_jax.methods.intrinsic import NAME as SUBSPACE
from lora_jax.methods.projections import NESTED
from lora_jax.methods.sites import Site
from lora_jax.train.cell import Cell


@dataclasses.dataclass(frozen=True)
class Pack:
    """Cells that train as one program; on disk also one cell that trains alone.

    `union` binds any of their methods: padded ranks, all their targets. `sites` holds, for each
    cell, `{adapter: Site}`; `ranks` the padded rank of each adapter; both are empty where nothing
    needs padding, since the methods are equal. `widths` are the cells' own sizes of θ, where they
    are random subspaces. `counts` are the numbers of parameters that each cell trains,
    `padding_efficiency` is the share of the padded factors that is the cells' own.
    """

    cells: tuple[Cell, ...]
    union: Method
    sites: tuple[Mapping[str, Site], ...]
    ranks: Mapping[str, int]
    widths: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    padding_efficiency: float = 1.0

    @property
    def num_steps(self) -> int:
        return self.cells[0].num_steps

    def take(self, places: Sequence[int]) -> Pack:
        """The same pack with these cells only: same union, so the same shapes for each."""
        names = ("cells", "sites", "widths", "counts")
        lists = {name: getattr(self, name) for name in names}
        taken = {name: tuple(of[k] for k in places) for name, of in lists.items() if of}
        return dataclasses.replace(self, **taken)

    def __str__(self) -> str:
        names = [cell.name for cell in self.cells]
        shown = ", ".join(names if len(names) <= 4 else [*names[:3], f"… {len(names) - 3} more"])
        ranks, padded = sorted(set(self.ranks.values())), ""
        if ranks:
            padded = (
                f"; padded to rank {', '.join(map(str, ranks))} on {len(self.ranks)} "
                f"parameter{'' if len(self.ranks) == 1 else 's'}, {self.padding_efficiency:.0%} "
                "of it their own"
            )
        elif len(set(self.widths)) > 1:
            padded = f"; padded to {max(self.widths)} dimensions"
        return f"{len(names)} in one program{padded}: {shown}"

    def init(self, keys: Sequence[jax.Array], params: Sequence[PyTree]) -> list[Trainable]:
        """Each cell's trainable tree as it starts alone, padded: all of the same shapes.

        `keys[k]` is the init key of cell k, `params[k]` its tree; trees may differ in what is
        trained whole.
        """
        union = jax.eval_shape(lambda: self.union.init(keys[0], params[0])[0])
        cells = []
        for k, (cell, key, tree) in enumerate(zip(self.cells, keys, params, strict=True)):
            own, _ = cell.method.init(key, tree)
            padded = {
                name: self._padded_shapes(name, own[name], k, entry) if name in own else entry
                for name, entry in union.items()
            }
            leaves, treedef = jax.tree.flatten(padded)
            cells.append(_padded(own, treedef, tuple((x.shape, x.dtype) for x in leaves)))
        return cells

    def data(self) -> dict[str, dict[str, jax.Array]]:
        """`{adapter: {"scale": (K,), "dropout": (K,)}}`, 0 where a cell does not have it; of
        random subspaces `{"intrinsic": {"width": (K,)}}`."""
        found: dict[str, dict[str, jax.Array]] = {}
        if self.widths:
            found[SUBSPACE] = {"width": jnp.array(self.widths)}
        for name in self.ranks:
            sites = [own.get(name) for own in self.sites]
            methods = [cast(LoRA, cell.method) for cell in self.cells]
            both = zip(methods, sites, strict=True)
            scales = [method.scale(site.rule) if site else 0.0 for method, site in both]
            dropouts = [site.rule.dropout if site else 0.0 for site in sites]
            found[name] = {"scale": jnp.array(scales), "dropout": jnp.array(dropouts)}
        return found

    def bind(self, trainable: Trainable, frozen: tuple[Any, PyTree], *, key=None) -> PyTree:
        """One cell's params tree, inside a map over the cells; as `Method.bind`.

        `frozen` is its slice of `data()` with the base, which all share. A `key` turns dropout on.
        """
        data, frozen = frozen
        return self.union.bind(trainable, frozen, key=key, data=data)

    def unpack(self, trainable: Trainable, k: int) -> Trainable:
        """Cell k's own trainable tree, at its true ranks and targets, out of its padded one."""
        own = {}
        for name, entry in trainable.items():
            if self.widths and name == SUBSPACE:
                own[name] = {**entry, "theta": entry["theta"][: self.widths[k]]}
            elif name not in self.ranks:
                own[name] = entry
            elif name in self.sites[k]:
                shapes = tuple(self._part_shape(part, self.sites[k][name]) for part in entry)
                own[name] = dict(zip(entry, _cut(tuple(entry.values()), shapes), strict=True))
        return own

    def _part_shape(self, part: str, site: Site) -> tuple[int, ...]:
        return site.part_shape(self.union.PARTS[part])

    def _padded_shapes(self, name: str, entry, k: int, union):
        """The shapes that cell k's entry is padded to."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), entry)
        if self.widths and name == SUBSPACE:
            return {**shapes, "theta": union["theta"]}
        if name not in self.ranks:
            return shapes
        site = self.sites[k][name]
        site = dataclasses.replace(site, rule=dataclasses.replace(site.rule, rank=self.ranks[name]))
        return {
            part: jax.ShapeDtypeStruct(self._part_shape(part, site), x.dtype)
            for part, x in shapes.items()
        }


def is_padded(method: Method) -> bool:
    """Whether cells of this method may differ in rank, targets, scale and dropout in one pack."""
    return isinstance(method, LoRA) and bool(method.ZERO_PADDABLE)


def is_subspace(method: Method) -> bool:
    """Whether cells of this method may differ in dimension in one pack: where subspaces nest."""
    return isinstance(method, IntrinsicDimension) and method.projection in NESTED


def make_pack(cells: Sequence[Cell], params: PyTree) -> Pack:
    """The pack of cells whose methods are all equal, or of one padded kind.

    Raises `RequestError` as their rules do.
    """
    methods = [cell.method for cell in cells]
    pack = Pack(tuple(cells), methods[0], tuple({} for _ in cells), {})
    if is_subspace(methods[0]):
        spaces = cast(list[IntrinsicDimension], methods)
        widest = max(spaces, key=lambda method: method.dim)
        sizes = tuple(method.theta_size(params) for method in spaces)
        pack = dataclasses.replace(pack, union=widest, widths=sizes)
    elif is_padded(methods[0]):
        pack = _padded_pack(pack, cast(list[LoRA], methods), params)
    tables = [list(method.table(params)) for method in methods]
    own = sum(row.num_trainable for table in tables for row in table if row.rank)
    padded = len(cells) * sum(row.num_trainable for row in pack.union.table(params) if row.rank)
    counts = tuple(sum(row.num_trainable for row in table) for table in tables)
    efficiency = own / padded if padded else 1.0
    return dataclasses.replace(pack, counts=counts, padding_efficiency=efficiency)


def _padded_pack(pack: Pack, methods: Sequence[LoRA], params: PyTree) -> Pack:
    """The pack of these methods with the widest rank of each of their adapters."""
    sites = tuple(method.sites(params) for method in methods)
    widest: dict[str, Site] = {}
    for name, own in ((name, own) for cell in sites for name, own in cell.items()):
        if name not in widest or own.rank > widest[name].rank:
            widest[name] = own
    # The union's own alpha and dropout never count: each cell's are data. A dropout above 0 says
    # that masks are drawn at all.
    alike = {"alpha": 1.0, "layers": None, "exclude": ()}
    alike["dropout"] = max(own.rule.dropout for cell in sites for own in cell.values())
    rules = [
        dataclasses.replace(own.rule, targets=re.escape(own.path), rank=own.rank, **alike)
        for own in widest.values()
    ]
    union = dataclasses.replace(
        methods[0],
        rules=rules,
        axes={own.path: KernelAxes.from_roles(own.roles) for own in widest.values()},
        train=[re.escape(path) for path in methods[0].whole_paths(params)],
    )
    ranks = {name: own.rank for name, own in widest.items()}
    return dataclasses.replace(pack, union=union, sites=sites, ranks=ranks)


# One program for a whole tree: leaf by leaf, each shape would be one to compile.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _padded(own: Trainable, treedef: Any, padded: tuple) -> Trainable:
    """`own` with zeros up to the shapes `padded`, and zeros alone where it has no entry."""
    shapes = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*both) for both in padded])
    return {
        name: jax.tree.map(lambda x, like: _pad(x, like.shape), own[name], entry)
        if name in own
        else jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), entry)
        for name, entry in shapes.items()
    }


@functools.partial(jax.jit, static_argnums=1)
def _cut(leaves: tuple[jax.Array, ...], shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    return [jax.lax.slice(x, [0] * x.ndim, s) for x, s in zip(leaves, shapes, strict=True)]


def _pad(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    if not x.ndim:  # `jnp.pad` takes no empty list of widths
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])
