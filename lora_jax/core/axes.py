"""`kernel_axes`: asks the model which axes of each parameter are input, output, or stacked.

A shape alone does not say it: a (64, 4, 16) kernel may be 64 inputs by 4 heads of 16, or 64 scanned
layers of 4 by 16. So the model is traced to a jaxpr and each parameter's axes are followed, as
tags, to the products that contract them. Nothing is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core import jaxprs, trees
from lora_jax.core.errors import RequestError


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """Axes of one kernel, counted from the end (-1 is the last), and the products that use it.

    `stack` axes hold one matrix per index (scanned layers, experts); `in_` axes are contracted
    with the input; `out` axes appear in the output. `conflicts` names uses that see it otherwise:
    a tied embedding is looked up by one product and contracted by another.
    """

    stack: tuple[int, ...]
    in_: tuple[int, ...]
    out: tuple[int, ...]
    ops: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()

    @classmethod
    def from_roles(cls, roles: str) -> KernelAxes:
        """The axes that these roles, a letter per axis, stand for.

        >>> KernelAxes.from_roles("sio")
        KernelAxes(stack=(-3,), in_=(-2,), out=(-1,), ops=(), conflicts=())
        """
        of = {r: tuple(n - len(roles) for n, x in enumerate(roles) if x == r) for r in "sio"}
        return cls(of["s"], of["i"], of["o"])

    def roles(self, ndim: int, path: str) -> str:
        """One letter per axis: "s", "i" or "o". Raises `RequestError` if they do not cover it."""
        named = dict.fromkeys(self.stack, "s")
        named |= dict.fromkeys(self.in_, "i") | dict.fromkeys(self.out, "o")
        count = len(self.stack) + len(self.in_) + len(self.out)
        if sorted(named) != list(range(-ndim, 0)) or count != ndim:
            raise RequestError(
                f"axes of {path!r} are stack={self.stack}, in_={self.in_}, out={self.out}; each of "
                f"its {ndim} axes, counted from the end (-{ndim} … -1), must be named exactly once"
            )
        if not self.in_ or not self.out:
            raise RequestError(
                f"axes of {path!r} have in_={self.in_} and out={self.out}; a low-rank adapter "
                "needs at least one axis of each; leave the parameter out of the rules"
            )
        return "".join(named[axis] for axis in range(-ndim, 0))


@dataclasses.dataclass(frozen=True)
class _Tags:
    """Which axes of which parameter each axis of a traced value consists of."""

    path: str
    ndim: int
    axes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]


def kernel_axes(apply: Callable, params: Any, *inputs, **options) -> dict[str, KernelAxes]:
    """`{path: KernelAxes}` for every parameter of two axes or more that meets a product.

    `apply(params, *inputs, **options)` is traced, never run: arrays and `jax.ShapeDtypeStruct`s
    serve alike. Followed through casts, transposes, reshapes, slices, jit, remat, scan, cond, while
    and custom derivatives to `dot_general`, `conv_general_dilated`, `ragged_dot` and `gather`.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((8, 2, 4))}
    >>> apply = lambda params, x: jnp.einsum("bi,ihd->bhd", x, params["kernel"])
    >>> axes = kernel_axes(apply, params, jnp.ones((3, 8)))["kernel"]
    >>> axes.in_, axes.out
    ((-3,), (-2, -1))
    """
    flat = trees.flatten(params)
    places = [n for n, leaf in enumerate(flat.leaves) if trees.is_array(leaf)]
    # What is stored in another form is traced as what it stands for.
    found = [flat.leaves[n] for n in places]
    arrays = [leaf.base if isinstance(leaf, trees.Stored) else leaf for leaf in found]
    # Inputs may be shape structs, so they are traced too; anything else stays a Python value.
    leaves, treedef = jax.tree_util.tree_flatten((inputs, options))
    traced = [n for n, leaf in enumerate(leaves) if trees.is_array(leaf)]

    def plain(arrays, given):
        inner = list(flat.leaves)
        for place, array in zip(places, arrays, strict=True):
            inner[place] = array
        inner_leaves = list(leaves)
        for place, array in zip(traced, given, strict=True):
            inner_leaves[place] = array
        args, kwargs = jax.tree_util.tree_unflatten(treedef, inner_leaves)
        return apply(flat.unflatten(inner), *args, **kwargs)

    jaxpr, consts, _ = jaxprs.trace(plain, arrays, [leaves[n] for n in traced])
    tags: list[_Tags | None] = [
        _Tags(flat.paths[n], leaf.ndim, tuple((axis,) for axis in range(leaf.ndim)), leaf.shape)
        for n, leaf in zip(places, arrays, strict=True)
    ]
    tags += [None] * len(traced)
    uses: dict[str, list[tuple[str, frozenset, frozenset, int]]] = {}
    _follow(jaxpr, [None] * len(consts), tags, uses)
    return {path: _resolve(found) for path, found in uses.items()}


def _resolve(found) -> KernelAxes:
    name, in_, out, ndim = found[0]
    # An axis that some use contracts and another keeps is a conflict; the first use decides.
    conflicts = [
        f"{other} contracts {tuple(sorted(a - ndim for a in other_in))}"
        for other, other_in, _, _ in found[1:]
        if other_in != in_
    ]
    both = in_ & out
    if both:
        conflicts.append(
            f"axes {tuple(sorted(a - ndim for a in both))} are split between in and out"
        )
        out = out - both
    stack = set(range(ndim)) - in_ - out

    def from_end(axes):
        return tuple(sorted(axis - ndim for axis in axes))

    ops = tuple(dict.fromkeys(op for op, _, _, _ in found))
    return KernelAxes(
        from_end(stack), from_end(in_), from_end(out), ops, tuple(dict.fromkeys(conflicts))
    )


def _follow(jaxpr, const_tags, arg_tags, uses) -> list[_Tags | None]:
    env: dict[Any, _Tags | None] = {}
    env.update(zip(jaxpr.constvars, const_tags, strict=True))
    env.update(zip(jaxpr.invars, arg_tags, strict=True))
    for eqn in jaxpr.eqns:
        tags = [None if jaxprs.is_literal(atom) else env.get(atom) for atom in eqn.invars]
        if any(tags):
            outs = _step(eqn, tags, uses)
            env.update(zip(eqn.outvars, outs, strict=False))
    return [None if jaxprs.is_literal(atom) else env.get(atom) for atom in jaxpr.outvars]


def _step(eqn, tags, uses) -> list[_Tags | None]:
    name, params = eqn.primitive.name, eqn.params
    shape = tuple(getattr(eqn.outvars[0].aval, "shape", ()))
    first = tags[0]
    if name == "dot_general":
        contracting, batch = params["dimension_numbers"]
        for side, tag in enumerate(tags):
            _record(uses, name, tag, contracting[side], batch[side])
        return [None]
    if name in ("ragged_dot", "ragged_dot_general"):
        if len(tags) > 1 and tags[1] is not None:
            _record(uses, "ragged_dot", tags[1], (len(tags[1].axes) - 2,), (0,))
        return [None] * len(eqn.outvars)
    if name == "conv_general_dilated":
        out_axis, in_axis, *spatial = params["dimension_numbers"].rhs_spec
        _record(uses, name, tags[1], (in_axis, *spatial), ())
        return [None]
    if name == "gather" and first is not None:
        looked_up = params["dimension_numbers"].collapsed_slice_dims
        _record(uses, name, first, looked_up, ())
        return [None]
    if name == "transpose":
        order = params["permutation"]
        return [_moved(first, [first.axes[axis] for axis in order], shape)]
    if name == "squeeze":
        dropped = {axis % len(first.axes) for axis in params["dimensions"]}
        return [_moved(first, [a for n, a in enumerate(first.axes) if n not in dropped], shape)]
    if name == "broadcast_in_dim" and first is not None:
        axes: list[tuple[int, ...]] = [()] * len(shape)
        for axis, place in enumerate(params["broadcast_dimensions"]):
            axes[place] = first.axes[axis]
        return [_moved(first, axes, shape)]
    if name == "reshape":
        axes = _reshaped(first, shape)
        return [None if axes is None else _moved(first, axes, shape)]
    if name in ("slice", "dynamic_slice", "split"):
        return [
            _moved(first, first.axes, tuple(v.aval.shape)) if first else None for v in eqn.outvars
        ]
    if name == "scan":
        num_consts, num_carry = jaxprs.scan_counts(eqn)
        whole, stacked = tags[: num_consts + num_carry], tags[num_consts + num_carry :]
        sliced = [t and _moved(t, t.axes[1:], t.sizes[1:]) for t in stacked]
        return _into(params["jaxpr"], [*whole, *sliced], uses)[:num_carry] + [None] * (
            len(eqn.outvars) - num_carry
        )
    if name == "while":
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        carry = tags[num_cond + num_body :]
        _into(params["cond_jaxpr"], [*tags[:num_cond], *carry], uses)
        return _into(params["body_jaxpr"], [*tags[num_cond : num_cond + num_body], *carry], uses)
    if name == "cond":
        return [_into(branch, tags[1:], uses) for branch in params["branches"]][0]
    inner = jaxprs.sub_jaxprs(eqn)
    if name == "shard_map":
        # Inside, each shard sees its part of every axis.
        parts = [var.aval.shape for var in jaxprs.opened(inner[0])[0].invars]
        tags = [t and _moved(t, t.axes, part) for t, part in zip(tags, parts, strict=True)]
        _into(inner[0], tags, uses)
        return [None] * len(eqn.outvars)
    if len(inner) == 1 and len(jaxprs.opened(inner[0])[0].invars) == len(tags):
        return _into(inner[0], tags, uses)
    # Elementwise: casts, a mask, a norm. The result keeps the axes of the operand of its shape.
    alike = [tag for tag in tags if tag is not None and tag.sizes == shape]
    kept = alike[0] if len(alike) == 1 else None
    return [kept if tuple(getattr(v.aval, "shape", ())) == shape else None for v in eqn.outvars]


def _into(jaxpr, tags, uses):
    jaxpr, consts = jaxprs.opened(jaxpr)
    return _follow(jaxpr, [None] * len(consts), tags, uses)


def _moved(tags: _Tags, axes, sizes) -> _Tags:
    return dataclasses.replace(tags, axes=tuple(axes), sizes=tuple(sizes))


def _reshaped(tags: _Tags, shape) -> list[tuple[int, ...]] | None:
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


def _record(uses, name, tag, contracted, batch) -> None:
    if tag is None or tag.ndim < 2:
        return
    in_ = frozenset(axis for n in contracted for axis in tag.axes[n])
    out = frozenset(
        axis
        for n, axes in enumerate(tag.axes)
        if n not in contracted and n not in batch
        for axis in axes
    )
    uses.setdefault(tag.path, []).append((name, in_, out, tag.ndim))
