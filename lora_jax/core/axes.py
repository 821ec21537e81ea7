"""`kernel_axes`: asks the model which axes of each parameter are input, output, or stacked.

A shape alone does not say it: a (64, 4, 16) kernel may be 64 inputs by 4 heads of 16, or 64 scanned
layers of 4 by 16. So the model is traced to a jaxpr and each parameter's axes are followed, as
tags, to the products that contract them. Nothing is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.core import jaxprs, trees
from lora_jax.core.errors import RequestError
from lora_jax.core.tags import Parts, Tags, Walk


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
        places = list(enumerate(roles, -len(roles)))
        stack, in_, out = (tuple(n for n, role in places if role == wanted) for wanted in "sio")
        return cls(stack, in_, out)

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


def roles_of_axes(axes: Mapping[str, KernelAxes] | None, path: str, ndim: int) -> str:
    """The roles of a kernel's axes as `axes` has them; without, "io" of a kernel of two axes.

    Raises `RequestError` where nothing says which axes are input and output.
    """
    known = None if axes is None else axes.get(path)
    if known is not None:
        return known.roles(ndim, path)
    if ndim == 2:
        return "io"
    raise RequestError(
        f"{path!r} has {ndim} axes and nothing says which are input and output; pass "
        "axes=lora_jax.kernel_axes(apply, params, *inputs), or your own "
        "{path: KernelAxes(stack=…, in_=…, out=…)}"
    )


def kernel_axes(apply: Callable, params: Any, *inputs, **options) -> dict[str, KernelAxes]:
    """Follows every parameter of two axes or more to the products that it meets.

    Followed through casts, transposes, reshapes, slices, pads, concatenations of parameters,
    elementwise operations, jit, remat, scan, cond, while and custom derivatives to `dot_general`,
    `conv_general_dilated`, `ragged_dot`, `gather` and the lookup of one row.

    Args:
      apply: the model, `apply(params, *inputs, **options)`, which is traced and never run.
      params: its parameters; arrays and `jax.ShapeDtypeStruct`s serve alike.
      *inputs: arrays or `jax.ShapeDtypeStruct`s; other values stay as they are.
      **options: likewise.

    Returns:
      `{path: KernelAxes}` of the parameters that meet a product.

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
    found = (flat.leaves[n] for n in places)
    arrays = [leaf.base if isinstance(leaf, trees.Stored) else leaf for leaf in found]
    # Inputs may be shape structs, so they are traced too; anything else stays a Python value.
    leaves, treedef = jax.tree_util.tree_flatten((inputs, options))
    traced = [n for n, leaf in enumerate(leaves) if trees.is_array(leaf)]

    def plain(arrays, given):
        inner = trees.filled(flat.leaves, places, arrays)
        args, kwargs = treedef.unflatten(trees.filled(leaves, traced, given))
        return apply(flat.unflatten(inner), *args, **kwargs)

    jaxpr, consts, *_ = jaxprs.trace(plain, arrays, [leaves[n] for n in traced])
    tags: list[Parts] = [
        (Tags(path, leaf.shape, tuple((n,) for n in range(leaf.ndim)), leaf.shape),)
        if leaf.ndim >= 2
        else ()
        for path, leaf in zip([flat.paths[n] for n in places], arrays, strict=True)
    ]
    tags += [()] * len(traced)
    walk = Walk({})
    walk.follow(jaxpr, [()] * len(consts), tags)
    resolved = ((path, _resolve(uses)) for path, uses in walk.uses.items())
    return {path: axes for path, axes in resolved if axes is not None}


def _resolve(found) -> KernelAxes | None:
    # A use that contracts all there is, or nothing, is of a vector: a bias, a class token.
    matrices = [use for use in found if use[1] and use[2] - use[1]]
    if not matrices:
        return None
    _, in_, out, ndim = matrices[0]

    def from_end(axes):
        return tuple(sorted(axis - ndim for axis in axes))

    # An axis that some use contracts and another keeps is a conflict; the first use decides.
    conflicts = [f"{op} contracts {from_end(own)}" for op, own, _, _ in found if own != in_]
    if both := in_ & out:
        conflicts.append(f"axes {from_end(both)} are split between in and out")
    out = out - both
    stack = set(range(ndim)) - in_ - out
    ops = tuple(dict.fromkeys(op for op, _, _, _ in found))
    conflicts = tuple(dict.fromkeys(conflicts))
    return KernelAxes(from_end(stack), from_end(in_), from_end(out), ops, conflicts)
