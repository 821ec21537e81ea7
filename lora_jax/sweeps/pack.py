"""A pack: cells whose adapters differ in rank, targets and scale, bound by one method.

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
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.axes import KernelAxes
from lora_jax.methods import IntrinsicDimension, LoRA, Method
from lora_jax.methods.base import PyTree, Trainable
from lora_jax.methods.intrinsic import NAME as SUBSPACE
from lora_jax.methods.projections import NESTED
from lora_jax.methods.sites import Site


@dataclasses.dataclass(frozen=True)
class Pack:
    """K methods that train as one.

    `union` binds any of them: padded ranks, all their targets. `sites` holds, for each member,
    `{adapter: Site}`; `ranks` the padded rank of each adapter; both are empty where nothing needs
    padding, since the methods are equal. `widths` are the members' own sizes of θ, where they
    are random subspaces.
    """

    members: tuple[Method, ...]
    union: Method
    sites: tuple[Mapping[str, Site], ...]
    ranks: Mapping[str, int]
    widths: tuple[int, ...] = ()

    def take(self, places: Sequence[int]) -> Pack:
        """The same pack with these members only: same union, so the same shapes for each."""
        members, sites = ([of[k] for k in places] for of in (self.members, self.sites))
        widths = tuple(self.widths[k] for k in places) if self.widths else ()
        return dataclasses.replace(self, members=tuple(members), sites=tuple(sites), widths=widths)

    def init(self, keys: Sequence[jax.Array], params: Sequence[PyTree]) -> list[Trainable]:
        """Each member's trainable tree as it starts alone, padded: all of the same shapes.

        `keys[k]` is the init key of member k, `params[k]` its tree; trees may differ in what is
        trained whole.
        """
        union = jax.eval_shape(lambda: self.union.init(keys[0], params[0])[0])
        cells = []
        for k, (member, key, tree) in enumerate(zip(self.members, keys, params, strict=True)):
            own, _ = member.init(key, tree)
            wide = {
                name: self._wide(name, own[name], k, entry) if name in own else entry
                for name, entry in union.items()
            }
            leaves, treedef = jax.tree.flatten(wide)
            cells.append(_padded(own, treedef, tuple((x.shape, x.dtype) for x in leaves)))
        return cells

    def data(self) -> dict[str, dict[str, jax.Array]]:
        """`{adapter: {"scale": (K,), "dropout": (K,)}}`, 0 where a member does not have it; of
        random subspaces `{"intrinsic": {"width": (K,)}}`."""

        def of_member(k: int, name: str) -> tuple[float, float]:
            site = self.sites[k].get(name)
            return (self.members[k].scale(site.rule), site.rule.dropout) if site else (0.0, 0.0)

        found: dict[str, dict[str, jax.Array]] = {}
        if self.widths:
            found[SUBSPACE] = {"width": jnp.array(self.widths)}
        for name in self.ranks:
            both = zip(*(of_member(k, name) for k in range(len(self.members))), strict=True)
            found[name] = dict(zip(("scale", "dropout"), map(jnp.array, both), strict=True))
        return found

    def bind(self, trainable: Trainable, frozen: tuple[Any, PyTree], *, key=None) -> PyTree:
        """One member's params tree, inside a map over the members; as `Method.bind`.

        `frozen` is its slice of `data()` with the base, which all share. A `key` turns dropout on.
        """
        data, frozen = frozen
        return self.union.bind(trainable, frozen, key=key, data=data)

    def unpack(self, trainable: Trainable, k: int) -> Trainable:
        """Member k's own trainable tree, at its true ranks and targets, out of its padded one."""
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

    def _wide(self, name: str, entry, k: int, union):
        """The shapes that member k's entry is padded to."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), entry)
        if self.widths and name == SUBSPACE:
            return {**shapes, "theta": union["theta"]}
        if name not in self.ranks:
            return shapes
        site = self.sites[k][name]
        wide = dataclasses.replace(site.rule, rank=self.ranks[name])
        wide = dataclasses.replace(site, rule=wide)
        return {
            part: jax.ShapeDtypeStruct(self._part_shape(part, wide), x.dtype)
            for part, x in shapes.items()
        }


def is_padded(method: Method) -> bool:
    """Whether cells of this method may differ in rank, targets, scale and dropout in one pack."""
    return isinstance(method, LoRA) and bool(method.ZERO_PADDABLE)


def is_subspace(method: Method) -> bool:
    """Whether cells of this method may differ in dimension in one pack: where subspaces nest."""
    return isinstance(method, IntrinsicDimension) and method.projection in NESTED


def make_pack(methods: Sequence[Method], params: PyTree) -> Pack:
    """The pack of `methods`: all equal, or of one padded kind, with one view of each kernel's axes.

    Raises `RequestError` as their rules do.
    """
    if is_subspace(methods[0]):
        widest = max(methods, key=lambda method: method.dim)
        sizes = tuple(method.theta_size(params) for method in methods)
        return Pack(tuple(methods), widest, tuple({} for _ in methods), {}, sizes)
    if not is_padded(methods[0]):
        return Pack(tuple(methods), methods[0], tuple({} for _ in methods), {})
    sites = tuple(method.sites(params) for method in methods)
    widest: dict[str, Site] = {}
    for name, own in ((name, own) for cell in sites for name, own in cell.items()):
        if name not in widest or own.rank > widest[name].rank:
            widest[name] = own
    # The union's own alpha and dropout never count: each cell's are data. A dropout above 0 says
    # that masks are drawn at all.
    dropout = max(own.rule.dropout for cell in sites for own in cell.values())
    rules = [
        dataclasses.replace(
            own.rule,
            targets=re.escape(own.path),
            rank=own.rank,
            alpha=1.0,
            dropout=dropout,
            layers=None,
            exclude=(),
        )
        for own in widest.values()
    ]
    union = dataclasses.replace(
        methods[0],
        rules=rules,
        axes={own.path: KernelAxes.from_roles(own.roles) for own in widest.values()},
        train=[re.escape(path) for path in methods[0].whole_paths(params)],
    )
    return Pack(tuple(methods), union, sites, {name: own.rank for name, own in widest.items()})


# One program for a whole tree: leaf by leaf, each shape would be one to compile.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _padded(own: Trainable, treedef: Any, wide: tuple) -> Trainable:
    """`own` with zeros up to the shapes `wide`, and zeros alone where it has no entry."""
    shapes = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*both) for both in wide])
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
    return jnp.pad(x, [(0, wide - own) for own, wide in zip(x.shape, shape, strict=True)])
