"""How `kernel_axes` follows the axes of a parameter, as tags, through a jaxpr."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lora_jax.core import jaxprs


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


@dataclasses.dataclass(frozen=True)
class Walk:
    """The walk through a jaxpr: the uses found so far, and whether this is the body of a loop."""

    uses: dict[str, list[tuple[str, frozenset, frozenset, int]]]
    in_loop: bool = False

    def follow(self, jaxpr, const_tags, arg_tags) -> list[Parts]:
        env: dict[Any, Parts] = {}
        env.update(zip(jaxpr.constvars, const_tags, strict=True))
        env.update(zip(jaxpr.invars, arg_tags, strict=True))
        for eqn in jaxpr.eqns:
            tags = [() if jaxprs.is_literal(atom) else env.get(atom, ()) for atom in eqn.invars]
            if any(tags):
                env.update(zip(eqn.outvars, self._step(eqn, tags), strict=False))
        return [() if jaxprs.is_literal(atom) else env.get(atom, ()) for atom in jaxpr.outvars]

    def _step(self, eqn, tags: list[Parts]) -> list[Parts]:
        name = eqn.primitive.name
        if name in ("scan", "while", "cond", "shard_map"):
            return getattr(self, f"_{name}")(eqn, tags)
        if name in ("device_put", "optimization_barrier"):
            return tags
        if name in ("concatenate", "stack") and not all(tags):
            return [()]  # a class token before its patches: no longer a parameter
        inner = jaxprs.sub_jaxprs(eqn)
        if len(inner) == 1 and len(jaxprs.opened(inner[0])[0].invars) == len(tags):
            return self._into(inner[0], tags)
        # Each parameter by itself: what becomes of one does not depend on the others.
        outs: list[list[Tags]] = [[] for _ in eqn.outvars]
        for place, parts in enumerate(tags):
            for part in parts:
                for out, found in zip(outs, self._one(eqn, place, part), strict=False):
                    if found is not None and found not in out:
                        out.append(found)
        return [tuple(out) for out in outs]

    def _scan(self, eqn, tags):
        num_consts, num_carry = jaxprs.scan_counts(eqn)
        whole, stacked = tags[: num_consts + num_carry], tags[num_consts + num_carry :]
        sliced = [tuple(_moved(t, t.axes[1:], t.sizes[1:]) for t in parts) for parts in stacked]
        carry = self._into(eqn.params["jaxpr"], [*whole, *sliced], in_loop=True)[:num_carry]
        return carry + [()] * (len(eqn.outvars) - num_carry)

    def _while(self, eqn, tags):
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = tags[num_cond + num_body :]
        self._into(eqn.params["cond_jaxpr"], [*tags[:num_cond], *carry], in_loop=True)
        body = [*tags[num_cond : num_cond + num_body], *carry]
        return self._into(eqn.params["body_jaxpr"], body, in_loop=True)

    def _cond(self, eqn, tags):
        return [self._into(branch, tags[1:]) for branch in eqn.params["branches"]][0]

    def _shard_map(self, eqn, tags):
        # Inside, each shard sees its part of every axis.
        (inner,) = jaxprs.sub_jaxprs(eqn)
        shapes = [var.aval.shape for var in jaxprs.opened(inner)[0].invars]
        self._into(
            inner,
            [
                tuple(_moved(t, t.axes, shape) for t in parts)
                for parts, shape in zip(tags, shapes, strict=True)
            ],
        )
        return [()] * len(eqn.outvars)

    def _into(self, jaxpr, tags, *, in_loop=False) -> list[Parts]:
        jaxpr, consts = jaxprs.opened(jaxpr)
        walk = dataclasses.replace(self, in_loop=self.in_loop or in_loop)
        return walk.follow(jaxpr, [()] * len(consts), tags)

    def _one(self, eqn, place: int, tag: Tags) -> Sequence[Tags | None]:
        """What becomes of one tagged operand: its tags in each result."""
        name, params = eqn.primitive.name, eqn.params
        shapes = [tuple(getattr(var.aval, "shape", ())) for var in eqn.outvars]
        shape = shapes[0] if shapes else ()
        if name == "dot_general":
            contracting, batch = params["dimension_numbers"]
            return self._record(name, tag, contracting[place], batch[place])
        if name in ("ragged_dot", "ragged_dot_general"):
            if place != 1:
                return ()
            return self._record("ragged_dot", tag, (len(tag.axes) - 2,), (0,))
        if name == "conv_general_dilated":
            return self._convolved(params, tag) if place == 1 else ()
        if name == "gather":
            return self._gathered(params, tag) if place == 0 else ()
        if name == "dynamic_slice" and place == 0 and self._is_row(eqn, tag):
            return self._record("gather", tag, _cut(eqn, tag))
        if name == "transpose":
            return [_moved(tag, [tag.axes[axis] for axis in params["permutation"]], shape)]
        if name == "squeeze":
            dropped = {axis % len(tag.axes) for axis in params["dimensions"]}
            return [_moved(tag, [a for n, a in enumerate(tag.axes) if n not in dropped], shape)]
        if name == "broadcast_in_dim":
            axes: list[tuple[int, ...]] = [()] * len(shape)
            for axis, to in enumerate(params["broadcast_dimensions"]):
                axes[to] = tag.axes[axis]
            spread = tag.spread or math.prod(shape) > math.prod(tag.sizes)
            return [dataclasses.replace(_moved(tag, axes, shape), spread=spread)]
        if name == "reshape":
            # vmap of a convolution permutes the axes within its reshape.
            order = params["dimensions"] or range(len(tag.axes))
            sizes = [tag.sizes[axis] for axis in order]
            tag = _moved(tag, [tag.axes[axis] for axis in order], sizes)
            split = _reshaped(tag, shape)
            return () if split is None else [_moved(tag, split, shape)]
        if name in ("slice", "dynamic_slice", "split", "pad", "concatenate"):
            is_cut = place == 0 or name == "concatenate"
            return [_moved(tag, tag.axes, sizes) for sizes in shapes] if is_cut else ()
        if name == "stack":
            axes = list(tag.axes)
            axes.insert(params["axis"], ())
            return [_moved(tag, axes, shape)]
        # Elementwise: casts, a mask, a norm. The result keeps the axes of an operand of its shape.
        # A vector spread over the activations (a bias, the scale of a norm) is one of them then.
        if tag.sizes != shape or (tag.spread and sum(n > 1 for n in tag.shape) < 2):
            return ()
        return [tag if sizes == shape else None for sizes in shapes]

    def _is_row(self, eqn, tag: Tags) -> bool:
        """Whether a slice is a lookup of one row: not a layer of a loop, nor a fixed place."""
        wide = [axis for axis, size in enumerate(tag.sizes) if size > 1]
        moving = not all(jaxprs.is_literal(start) for start in eqn.invars[1:])
        return moving and not self.in_loop and len(wide) == 2 and len(_cut(eqn, tag)) == 1

    def _convolved(self, params, tag: Tags):
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
        tag = _moved(tag, axes, tag.sizes)
        return self._record("conv_general_dilated", tag, (in_axis, *spatial))

    def _gathered(self, params, tag: Tags):
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        looked_up = [
            axis
            for axis in numbers.start_index_map
            if axis in numbers.collapsed_slice_dims or sizes[axis] == 1 < tag.sizes[axis]
        ]
        return self._record("gather", tag, looked_up, numbers.operand_batching_dims)

    def _record(self, name, tag: Tags, contracted, batch=()) -> tuple:
        in_ = frozenset(axis for n in contracted for axis in tag.axes[n])
        out = frozenset(
            axis
            for n, axes in enumerate(tag.axes)
            if n not in contracted and n not in batch
            for axis in axes
        )
        self.uses.setdefault(tag.path, []).append((name, in_, out, len(tag.shape)))
        return ()


def _cut(eqn, tag: Tags) -> list[int]:
    """The axes that a slice cuts to one index; none if it cuts another in part."""
    sizes = eqn.params["slice_sizes"]
    cut = [n for n, size in enumerate(sizes) if size != tag.sizes[n]]
    return cut if all(sizes[n] == 1 for n in cut) else []


def _moved(tags: Tags, axes, sizes) -> Tags:
    return dataclasses.replace(tags, axes=tuple(axes), sizes=tuple(sizes))


def _reshaped(tags: Tags, shape) -> list[tuple[int, ...]] | None:
    """Tags after a reshape: a merged axis carries all its parts, a split one goes to each part."""
    old = [(n, axes) for n, axes in zip(tags.sizes, tags.axes, strict=True) if n != 1]
    axes: list[tuple[int, ...]] = []
    at = 0
    while len(axes) < len(shape):
        if shape[len(axes)] == 1:
            axes.append(())
            continue
        begin, size, covered, merged = len(axes), 1, 1, []
        end = begin
        while size != covered or size == 1:
            if size <= covered and end < len(shape):
                size *= shape[end]
                end += 1
            elif at < len(old):
                covered *= old[at][0]
                merged.extend(old[at][1])
                at += 1
            else:
                return None
        axes.extend(() if shape[n] == 1 else tuple(merged) for n in range(begin, end))
    return axes if math.prod(shape) == math.prod(tags.sizes) else None
