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

    def init(self, keys: Sequence[jax.Array], params: Sequence[PyTree]) -> Trainable:
        """The trainable trees of all, leaves with a leading axis K, each as it starts alone.

        `keys[k]` is the init key of member k, `params[k]` its tree; trees may differ in what is
        trained whole.
        """
        shapes = jax.eval_shape(lambda: self.union.init(keys[0], params[0])[0])
        cells = []
        for k, (member, key, tree) in enumerate(zip(self.members, keys, params, strict=True)):
            own, _ = member.init(key, tree)
            cells.append(
                {
                    name: self._padded(name, own[name], k, entry)
                    if name in own
                    else jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), entry)
                    for name, entry in shapes.items()
                }
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells)

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
                site = self.sites[k][name]
                own[name] = {
                    part: jax.lax.slice(x, [0] * x.ndim, self._part_shape(part, site))
                    for part, x in entry.items()
                }
        return own

    def _part_shape(self, part: str, site: Site) -> tuple[int, ...]:
        return site.part_shape(self.union.PARTS[part])

    def _padded(self, name: str, entry, k: int, shapes):
        if self.widths and name == SUBSPACE:
            return {**entry, "theta": _pad(entry["theta"], shapes["theta"].shape)}
        if name not in self.ranks:
            return entry
        site = self.sites[k][name]
        wide = dataclasses.replace(site.rule, rank=self.ranks[name])
        wide = dataclasses.replace(site, rule=wide)
        return {part: _pad(x, self._part_shape(part, wide)) for part, x in entry.items()}


def is_padded(method: Method) -> bool:
    """Whether cells of this method may differ in rank, targets, scale and dropout in one pack."""
    return isinstance(method, LoRA) and bool(method.PADS)


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


def _pad(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    if not x.ndim:  # `jnp.pad` takes no empty list of widths
        return x
    return jnp.pad(x, [(0, wide - own) for own, wide in zip(x.shape, shape, strict=True)])
