"""How `kernel_axes` follows the axes of a parameter, as tags, through a jaxpr."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.core import jaxprs
from lora_jax.core.lookups import looked_up
from lora_jax.core.reshapes import matched_runs


@dataclasses.dataclass(frozen=True)
class Tags:
    """Which axes of which parameter each axis of a traced value consists of."""

    path: str
    shape: tuple[int, ...]  # the parameter's
    axes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]  # of the traced value
    spread: bool = False  # repeated along an axis


# What a traced value consists of: after a concatenation, several parameters.
Parts = tuple[Tags, ...]

# Primitive name -> rule(walk, equation, place, tag) -> what becomes of the tagged operand at
# `place`, a tag or None per result. A primitive without a rule is taken to be elementwise.
AXIS_RULES: dict[str, Callable[[Walk, Any, int, Tags], Sequence[Tags | None]]] = {}
# Primitive name -> rule(walk, equation, tags of every operand) -> the tags of every result, for
# primitives whose operands go to different places: loops, branches and what moves nothing.
WHOLE_RULES: dict[str, Callable[[Walk, Any, list[Parts]], list[Parts]]] = {}


def axis_rule(*names: str, table: dict[str, Any] = AXIS_RULES):
    """Registers a rule of `kernel_axes` for the primitives of these names."""

    def register(rule):
        table.update(dict.fromkeys(names, rule))
        return rule

    return register


@dataclasses.dataclass(frozen=True)
class Walk:
    """The walk through a jaxpr: the uses found so far, and whether this is the body of a loop."""

    uses: dict[str, list[tuple[str, frozenset, frozenset, int]]]
    in_loop: bool = False

    def follow(self, jaxpr, const_tags, arg_tags) -> list[Parts]:
        variables, tags = (*jaxpr.constvars, *jaxpr.invars), (*const_tags, *arg_tags)
        env: dict[Any, Parts] = dict(zip(variables, tags, strict=True))
        for eqn in jaxpr.eqns:
            tags = [() if jaxprs.is_literal(atom) else env.get(atom, ()) for atom in eqn.invars]
            if any(tags):
                env.update(zip(eqn.outvars, self._step(eqn, tags), strict=False))
        return [() if jaxprs.is_literal(atom) else env.get(atom, ()) for atom in jaxpr.outvars]

    def _step(self, eqn, tags: list[Parts]) -> list[Parts]:
        name = eqn.primitive.name
        if name in WHOLE_RULES:
            return WHOLE_RULES[name](self, eqn, tags)
        if name in ("concatenate", "stack") and not all(tags):
            return [()]  # a class token before its patches: no longer a parameter
        inner = jaxprs.sub_jaxprs(eqn)
        if len(inner) == 1 and len(jaxprs.opened(inner[0])[0].invars) == len(tags):
            return self.into(inner[0], tags)
        # Each parameter by itself: what becomes of one does not depend on the others.
        rule = AXIS_RULES.get(name, _elementwise)
        outs: list[list[Tags]] = [[] for _ in eqn.outvars]
        for place, parts in enumerate(tags):
            for part in parts:
                for out, found in zip(outs, rule(self, eqn, place, part), strict=False):
                    if found is not None and found not in out:
                        out.append(found)
        return [tuple(out) for out in outs]

    def into(self, jaxpr, tags, *, in_loop=False) -> list[Parts]:
        """The tags of a sub-jaxpr's results."""
        jaxpr, consts = jaxprs.opened(jaxpr)
        walk = dataclasses.replace(self, in_loop=self.in_loop or in_loop)
        return walk.follow(jaxpr, [()] * len(consts), tags)

    def record(self, name: str, tag: Tags, contracted, batch=()) -> tuple:
        """Notes a use of the parameter that contracts these axes of the traced value."""
        kept = [n for n in range(len(tag.axes)) if n not in contracted and n not in batch]
        in_, out = (frozenset(x for n in axes for x in tag.axes[n]) for axes in (contracted, kept))
        self.uses.setdefault(tag.path, []).append((name, in_, out, len(tag.shape)))
        return ()


@axis_rule("device_put", "optimization_barrier", table=WHOLE_RULES)
def _unmoved(walk, eqn, tags):
    return tags


@axis_rule("scan", table=WHOLE_RULES)
def _scan(walk, eqn, tags):
    num_consts, num_carry = jaxprs.scan_counts(eqn)
    whole, stacked = tags[: num_consts + num_carry], tags[num_consts + num_carry :]
    sliced = [tuple(_moved(t, t.axes[1:], t.sizes[1:]) for t in parts) for parts in stacked]
    carry = walk.into(eqn.params["jaxpr"], [*whole, *sliced], in_loop=True)[:num_carry]
    return carry + [()] * (len(eqn.outvars) - num_carry)


@axis_rule("while", table=WHOLE_RULES)
def _while(walk, eqn, tags):
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = tags[num_cond + num_body :]
    walk.into(eqn.params["cond_jaxpr"], [*tags[:num_cond], *carry], in_loop=True)
    body = [*tags[num_cond : num_cond + num_body], *carry]
    return walk.into(eqn.params["body_jaxpr"], body, in_loop=True)


@axis_rule("cond", table=WHOLE_RULES)
def _cond(walk, eqn, tags):
    return [walk.into(branch, tags[1:]) for branch in eqn.params["branches"]][0]


@axis_rule("shard_map", table=WHOLE_RULES)
def _shard_map(walk, eqn, tags):
    # Inside, each shard sees its part of every axis.
    (inner,) = jaxprs.sub_jaxprs(eqn)
    shapes = [var.aval.shape for var in jaxprs.opened(inner)[0].invars]
    parts_of = zip(tags, shapes, strict=True)
    walk.into(inner, [tuple(_moved(t, t.axes, n) for t in parts) for parts, n in parts_of])
    return [()] * len(eqn.outvars)


@axis_rule("dot_general")
def _dot_general(walk, eqn, place, tag):
    contracting, batch = eqn.params["dimension_numbers"]
    return walk.record("dot_general", tag, contracting[place], batch[place])


@axis_rule("ragged_dot", "ragged_dot_general")
def _ragged_dot(walk, eqn, place, tag):
    return walk.record("ragged_dot", tag, (len(tag.axes) - 2,), (0,)) if place == 1 else ()


@axis_rule("conv_general_dilated")
def _conv(walk, eqn, place, tag):
    if place != 1:
        return ()
    params = eqn.params
    out_axis, in_axis, *spatial = params["dimension_numbers"].rhs_spec
    # vmap puts the stack of kernels, and Keras the channels of a depthwise one, before the
    # outputs of each in one axis: as many groups.
    groups, stack = params["feature_group_count"] * params["batch_group_count"], []
    for axis in tag.axes[out_axis][:-1]:
        if groups % tag.shape[axis]:
            break
        stack.append(axis)
        groups //= tag.shape[axis]
    kept = tuple(axis for axis in tag.axes[out_axis] if axis not in stack)
    axes = [kept if n == out_axis else own for n, own in enumerate(tag.axes)]
    return walk.record("conv_general_dilated", _moved(tag, axes, tag.sizes), (in_axis, *spatial))


@axis_rule("gather")
def _gather(walk, eqn, place, tag):
    if place != 0:
        return ()
    batch = eqn.params["dimension_numbers"].operand_batching_dims
    return walk.record("gather", tag, looked_up(eqn, tag.sizes), batch)


@axis_rule("dynamic_slice")
def _dynamic_slice(walk, eqn, place, tag):
    # A slice is a lookup of one row where it is neither a layer of a loop nor a fixed place.
    wide = [axis for axis, size in enumerate(tag.sizes) if size > 1]
    moving = not all(jaxprs.is_literal(start) for start in eqn.invars[1:])
    is_row = moving and not walk.in_loop and len(wide) == 2 and len(_cut(eqn, tag)) == 1
    if place == 0 and is_row:
        return walk.record("gather", tag, _cut(eqn, tag))
    return _sliced(walk, eqn, place, tag)


@axis_rule("slice", "split", "pad")
def _sliced(walk, eqn, place, tag):
    return [_moved(tag, tag.axes, shape) for shape in _shapes(eqn)] if place == 0 else ()


# What each axis of the result consists of, for primitives that move axes about.
_MOVED = {
    "concatenate": lambda axes, params: axes,
    "stack": lambda axes, params: [*axes[: params["axis"]], (), *axes[params["axis"] :]],
    "transpose": lambda axes, params: [axes[axis] for axis in params["permutation"]],
    "squeeze": lambda axes, params: _without(axes, params["dimensions"]),
}


@axis_rule(*_MOVED)
def _rearranged(walk, eqn, place, tag):
    axes = _MOVED[eqn.primitive.name](tag.axes, eqn.params)
    return [_moved(tag, axes, _shapes(eqn)[0])]


def _without(axes, dimensions) -> list:
    dropped = {axis % len(axes) for axis in dimensions}
    return [own for n, own in enumerate(axes) if n not in dropped]


@axis_rule("broadcast_in_dim")
def _broadcast(walk, eqn, place, tag):
    (shape,) = _shapes(eqn)
    axes: list[tuple[int, ...]] = [()] * len(shape)
    for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
        axes[to] = tag.axes[axis]
    spread = tag.spread or math.prod(shape) > math.prod(tag.sizes)
    return [dataclasses.replace(_moved(tag, axes, shape), spread=spread)]


@axis_rule("reshape")
def _reshape(walk, eqn, place, tag):
    # vmap of a convolution permutes the axes within its reshape.
    order = eqn.params["dimensions"] or range(len(tag.axes))
    tag = _moved(tag, [tag.axes[axis] for axis in order], [tag.sizes[axis] for axis in order])
    (shape,) = _shapes(eqn)
    # A merged axis carries all its parts, a split one goes to each part.
    axes: list[tuple[int, ...]] = [()] * len(shape)
    for mine, theirs in matched_runs(tag.sizes, shape) or ():
        for n in theirs:
            axes[n] = tuple(axis for m in mine for axis in tag.axes[m])
    return [_moved(tag, axes, shape)]


def _elementwise(walk, eqn, place, tag):
    """Casts, a mask, a norm: the result keeps the axes of an operand of its shape.

    A vector spread over the activations (a bias, the scale of a norm) is one of them then.
    """
    shapes = _shapes(eqn)
    if not shapes or tag.sizes != shapes[0] or (tag.spread and sum(n > 1 for n in tag.shape) < 2):
        return ()
    return [tag if sizes == shapes[0] else None for sizes in shapes]


def _shapes(eqn) -> list[tuple[int, ...]]:
    return [tuple(getattr(var.aval, "shape", ())) for var in eqn.outvars]


def _cut(eqn, tag: Tags) -> list[int]:
    """The axes that a slice cuts to one index; none if it cuts another in part."""
    sizes = eqn.params["slice_sizes"]
    cut = [n for n, size in enumerate(sizes) if size != tag.sizes[n]]
    return cut if all(sizes[n] == 1 for n in cut) else []


def _moved(tags: Tags, axes, sizes) -> Tags:
    return dataclasses.replace(tags, axes=tuple(axes), sizes=tuple(sizes))
