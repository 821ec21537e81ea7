"""`quantize`: parameters to four bits, chosen by path; and back into plain or quantised arrays."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.core import trees
from lora_jax.core.axes import KernelAxes, roles_of_axes
from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.core.rules import Aliases, check_each_matches, pattern_of
from lora_jax.core.values import is_adapted, is_bound
from lora_jax.methods.base import Method, Trainable
from lora_jax.methods.merging import merged
from lora_jax.quant import nf4
from lora_jax.quant.weight import NF4Weight, encode_kernel

PyTree = Any
FORMATS = ("nf4",)


class SkippedWarning(UserWarning):
    """Parameters that a target names and that have no four-bit form: vectors, integers."""


def quantize(
    params: PyTree,
    targets: str | Sequence[str],
    *,
    format: str = "nf4",
    double_quant: bool = True,
    axes: Mapping[str, KernelAxes] | None = None,
    aliases: Aliases | None = None,
) -> PyTree:
    """`params` with each matrix that `targets` names in four bits; the others are the same arrays.

    Source: QLoRA (arXiv:2305.14314), Section 3.

    Args:
      params: the tree of parameters.
      targets: a regular expression over whole paths, or aliases of the model family joined by
        commas ("all-linear").
      format: "nf4".
      double_quant: keeps the scales in 8 bits: 4.127 bits per parameter, not 4.5 (see `quant.nf4`).
      axes: what `kernel_axes` gave, for kernels of more than two axes.
      aliases: `{name: expression}` of the model family.

    Returns:
      A tree that goes wherever `params` went: `lift(apply)`, a method's `init` and `bind`. Vectors,
      integers and, with `axes`, what it does not name are left as they are where `targets` match
      them, and listed in a `SkippedWarning`.

    Raises:
      RequestError: for targets that name no matrix, one that is quantised or adapted already, an
        unknown format, or numbers that are not finite.

    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    >>> quantized = quantize(params, "kernel", double_quant=False)
    >>> quantized["kernel"].shape, quantized["kernel"].nbytes
    ((64, 32), 1152)
    >>> lift(lambda params, x: x @ params["kernel"])(quantized, jnp.ones((2, 64))).shape
    (2, 32)
    """
    check_format(format)
    flat = trees.flatten(params, is_leaf=is_adapted)
    arrays = [path for path, leaf in flat.items() if trees.is_array(leaf) or is_adapted(leaf)]
    check_each_matches("targets", targets, arrays, aliases)
    pattern = pattern_of(targets, aliases)
    named = {path: leaf for path, leaf in flat.items() if pattern.fullmatch(path)}
    chosen: dict[str, str] = {}
    skipped: list[str] = []
    for path, leaf in named.items():
        if is_adapted(leaf):
            how = "holds an adapter" if is_bound(leaf) else "is quantised"
            raise RequestError(f"{path!r} {how} already; quantise the plain parameters once")
        roles, why = _roles(path, leaf, axes)
        if roles is None:
            skipped.append(f"{path!r} {why}")
        else:
            chosen[path] = roles
    if not chosen:
        raise RequestError(f"targets={targets!r} name no matrix: {skipped[0]}")
    values = {
        path: to_nf4(named[path], roles, path, double_quant=double_quant)
        for path, roles in chosen.items()
    }
    if skipped:
        listed = "; ".join(skipped)
        warnings.warn(f"left as they are: {listed}", SkippedWarning, stacklevel=2)
    return trees.put(params, values, is_leaf=is_adapted)


def check_format(format: str) -> None:
    """Raises `RequestError` for an unknown format."""
    if format not in FORMATS:
        raise RequestError(f"format is {format!r}; {trees.nearest(str(format), FORMATS)}")


def to_nf4(kernel: Any, roles: str, path: str, *, double_quant: bool, dtype=None) -> NF4Weight:
    """`encode_kernel`, compiled once per shape, of one matrix of a stack at a time.

    Raises `RequestError` for numbers that are not finite.
    """
    traced = isinstance(kernel, Tracer)
    dtype = None if dtype is None else jnp.dtype(dtype)
    value, finite = _encoder(roles, double_quant and traced, dtype)(kernel)
    if not traced and not bool(finite):
        raise RequestError(f"{path!r} holds NaN or infinity, which has no four-bit form")
    if double_quant and not traced:  # on the host: see `nf4.encode_scales`
        flat = np.asarray(value.scales).reshape(*value.stack, -1)
        codes, block_scales, mean = map(jnp.asarray, nf4.encode_scales(flat))
        more = {"block_scales": block_scales, "mean": mean}
        value = dataclasses.replace(value, scales=codes.reshape(value.scales.shape), **more)
    return dataclasses.replace(value, path=path)


@functools.cache
def _encoder(roles: str, double_quant: bool, dtype: Any) -> Callable:
    stacked = roles.count("s")

    def one(matrix):
        return encode_kernel(matrix, roles[stacked:], "", double_quant=double_quant, dtype=dtype)

    @jax.jit
    def encode(kernel):
        finite = jnp.isfinite(kernel).all()
        if not stacked:
            return one(kernel), finite
        # Matrix by matrix, so that what is made on the way is of one matrix.
        value = jax.lax.map(one, kernel.reshape(-1, *kernel.shape[stacked:]))
        value = jax.tree.map(lambda x: x.reshape(*kernel.shape[:stacked], *x.shape[1:]), value)
        return dataclasses.replace(value, roles=roles), finite

    return encode


def _roles(path: str, leaf: Any, axes) -> tuple[str | None, str]:
    """The letters of a kernel's axes; or None, and why it is left as it is."""
    if not trees.is_float(leaf) or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return None, f"is {leaf.dtype}"
    if leaf.ndim < 2:
        return None, "is a vector" if leaf.ndim else "is a number"
    if axes is not None and axes.get(path) is None:
        return None, "is in no product of the model (axes= does not name it)"
    roles = roles_of_axes(axes, path, leaf.ndim)
    stack = roles.count("s")
    if "s" in roles[stack:]:
        return None, "has stack axes behind others"
    if len(roles) == stack + 1 or not {"i", "o"} <= set(roles):
        return None, "is a stack of vectors"
    return roles, ""


def dequantize(params: PyTree) -> PyTree:
    """`params` with plain arrays again, in the dtypes they had: what the model computed with."""
    flat = trees.flatten(params, is_leaf=is_adapted)
    return flat.unflatten(
        [leaf.dequantize() if isinstance(leaf, NF4Weight) else leaf for leaf in flat.leaves]
    )


@dataclasses.dataclass(frozen=True)
class Requantized:
    """A merged and quantised tree, and what that cost.

    `params`: quantised where the base was. `errors`: for each of them ‖Q(W + ΔW) − (W + ΔW)‖_F /
    ‖W + ΔW‖_F. `changes`: ‖ΔW‖_F / ‖W + ΔW‖_F; an adapter smaller than the error is mostly lost.
    `drift`: the largest absolute difference of the outputs, `mean_drift` its mean, both NaN where
    no inputs were given.
    """

    params: PyTree = dataclasses.field(repr=False)
    errors: Mapping[str, float]
    changes: Mapping[str, float]
    drift: float = float("nan")
    mean_drift: float = float("nan")


def merge_and_requantize(
    method: Method,
    trainable: Trainable,
    frozen: PyTree,
    *,
    apply: Callable | None = None,
    inputs: Sequence[Any] = (),
    **options: Any,
) -> Requantized:
    """W + ΔW in four bits again, with the error of that, matrix by matrix.

    Rounding to four bits is not small compared with ΔW: look at the drift before using the result.

    Args:
      method: the adapter's.
      trainable: the adapter.
      frozen: its quantised base.
      apply: a model, whose outputs with the adapter on its base and with the result are compared.
      inputs: `apply(params, *inputs, **options)` is called.
      **options: likewise.

    Returns:
      The tree, quantised where the base was, and its errors.

    Raises:
      RequestError: nothing in `frozen` is quantised, or the method adds to no parameter.
    """
    method.check_merges()
    bound = method.bind(trainable, frozen)
    flat = trees.flatten(bound, is_leaf=is_adapted)
    stored = {path: leaf for path, leaf in flat.items() if is_adapted(leaf) and leaf.is_stored}
    if not stored:
        raise RequestError("nothing in the base is quantised; use method.merge")
    values, errors, changes = {}, {}, {}
    for path, leaf in stored.items():
        base: Any = leaf
        while not isinstance(base, NF4Weight):
            base = base.kernel
        if base is leaf:
            values[path], errors[path], changes[path] = base, 0.0, 0.0
            continue
        whole = leaf.expanded(jnp.float32)
        value = to_nf4(
            whole, base.roles, path,
            double_quant=base.mean is not None, dtype=base.stored_dtype,
        )  # fmt: skip
        norm = float(jnp.linalg.norm(whole.ravel()))
        of = lambda x, norm=norm: float(jnp.linalg.norm(x.ravel())) / max(norm, 1e-30)  # noqa: E731
        errors[path] = of(value.dequantize().astype(jnp.float32) - whole)
        changes[path] = of(whole - base.dequantize().astype(jnp.float32))
        values[path] = value
    # The adapters of plain kernels merge into their kernels' own dtypes.
    values |= merged({path: leaf for path, leaf in flat.items() if path not in values})
    params = flat.unflatten([values[path] for path in flat.paths])
    if apply is None:
        return Requantized(params, errors, changes)
    run = jax.jit(lambda params: lift(apply)(params, *inputs, **options))
    before, after = (jax.tree.leaves(run(tree))[0] for tree in (bound, params))
    drift = np.abs(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    return Requantized(params, errors, changes, float(drift.max()), float(drift.mean()))


def merge_error(
    method: Method, trainable: Trainable, frozen: PyTree, *, dtype: Any, params: PyTree = None
) -> dict[str, float]:
    """For each quantised parameter, the error of merging it into `dtype`: ‖rounded − sum‖ / ‖sum‖.

    The sum W + ΔW is of the dequantised W, in float32: the base that was quantised is not known
    here. `params` is what the merge gave, where it is there already.
    """
    method.check_merges()
    bound = method.bind(trainable, frozen)
    rounded = dict(trees.flatten(merged(bound, dtype) if params is None else params).items())
    errors = {}
    for path, leaf in trees.flatten(bound, is_leaf=is_adapted).items():
        if not (is_adapted(leaf) and leaf.is_stored):
            continue
        whole = leaf.expanded(jnp.float32)
        error = jnp.linalg.norm((rounded[path].astype(jnp.float32) - whole).ravel())
        errors[path] = float(error / jnp.maximum(jnp.linalg.norm(whole.ravel()), 1e-30))
    return errors


def bits_per_param(params: PyTree) -> float:
    """What the quantised parameters of a tree take, in bits per parameter.

    Raises `RequestError` where there are none.
    """
    stored = [leaf for leaf in trees.flatten(params).leaves if isinstance(leaf, NF4Weight)]
    if not stored:
        raise RequestError("nothing in the tree is quantised")
    return 8 * sum(x.nbytes for x in stored) / sum(x.size for x in stored)
