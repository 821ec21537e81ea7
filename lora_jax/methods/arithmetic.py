"""Adapter arithmetic: sums, negation, compression, and the difference of two models.

What is added, compared and bounded is ΔW, never a and b: infinitely many factors make one ΔW. All
of it happens through the factors (QR of each, then an SVD of r x r), so no ΔW is formed but in
`difference`, which begins from two full kernels.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.axes import KernelAxes
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.core.hashes import hash_params
from lora_jax.core.rules import Aliases, Rule
from lora_jax.core.stacks import one_by_one
from lora_jax.core.values import is_adapted, is_bound
from lora_jax.methods.base import Method, PyTree, Trainable
from lora_jax.methods.lora import LoRA
from lora_jax.methods.rows import rows_name
from lora_jax.methods.sites import Site
from lora_jax.methods.starts import to_matrices
from lora_jax.methods.sums import Changes, side_by_side


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained adapter and the base it belongs to.

    `params` is that base (the full tree, plain arrays); `base_hash` its hash (hex). Arithmetic is
    between adapters of one base.
    """

    method: Method
    trainable: Trainable
    params: PyTree = dataclasses.field(repr=False)
    base_hash: str = ""

    def __post_init__(self):
        flat = trees.flatten(self.params, is_leaf=is_adapted)
        for path, leaf in flat.items():
            if isinstance(leaf, trees.Hole) or is_bound(leaf):
                what = "a hole" if isinstance(leaf, trees.Hole) else "an adapter"
                raise RequestError(
                    f"params has {what} at {path!r}; give the base's full tree, as it went into "
                    "`init`"
                )
        if not self.base_hash:
            arrays = {path: leaf for path, leaf in flat.items() if trees.is_array(leaf)}
            object.__setattr__(self, "base_hash", hash_params(arrays))

    def merge(self, *, dtype: Any = None) -> PyTree:
        """Plain parameters with the adapter folded in; `dtype` as in `Method.merge`."""
        return self.method.merge(self.trainable, self.params, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Approximated:
    """An adapter of given rank, and what it leaves out of what it stands for.

    `errors`: `{name: ‖ΔW − found‖_F / ‖ΔW‖_F}`; `error`: the same over all of them together;
    `left_out`: paths that differ between two models and are no part of the adapter.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"relative error {self.error:.3g}"
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            text += f", at most {self.errors[worst]:.3g} (at {worst!r})"
        return text + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def to_lora(adapter: Adapter) -> Adapter:
    """The same ΔW as plain LoRA with scale 1: PiSSA of rank r becomes rank 2r, exactly.

    Raises `RequestError` for a method whose change is not low-rank (DoRA).
    """
    return combine([adapter], [1.0], always=True)


def negate(adapter: Adapter) -> Adapter:
    """The adapter that takes away what this one adds: −ΔW. A parameter trained whole goes to the
    other side of the base's."""
    return combine([adapter], [-1.0])


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], *, always: bool = False
) -> Adapter:
    """The plain LoRA of Σ weight · ΔW: the factors stand side by side and ranks add (up to the full
    rank of each kernel, to which an SVD brings what would be more, losing nothing but rounding).

    Parameters trained whole become base + Σ weight · (value − base), rows of tables likewise; where
    one adapter trains whole what another adapts, the sum is whole. Everything is added in float32
    or wider and rounded once. One adapter with weight 1 is returned as it is, whatever its method
    (`always` converts it, too). Source of the form: `cat` of `peft`'s add_weighted_adapter, whose
    weight 1 changes rsLoRA and DoRA. Raises `RequestError` for adapters of different bases, or a
    method whose change is not low-rank.
    """
    _check(adapters, weights)
    if len(adapters) == 1 and weights[0] == 1.0 and not always:
        return adapters[0]
    changes = Changes(dict(trees.flatten(adapters[0].params).items()))
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, entry in adapter.trainable.items():
            changes.add(adapter.method, name, entry, weight)
    changes.settle()
    trainable: Trainable = {path: {"value": changes.value(path)} for path in changes.whole}
    rows, sites = {}, {}
    for path in changes.rows:
        rows[path], values = changes.rows_of(path)
        trainable[rows_name(path)] = {"rows": values}
    for name, parts in changes.low_rank.items():
        sum_of = side_by_side(parts)
        site, rank = sum_of.site, sum_of.a.shape[-1]
        full = min(site.size("i"), site.size("o"))
        sites[name] = _with_rank(site, min(rank, full))
        if rank > full:  # more ranks than the matrix has: brought to its own
            p, q, sigma = _svd_of_factors(sum_of.a, sum_of.b, site)
            trainable[name] = _balanced(p, sigma, q, sites[name])
        else:
            trainable[name] = {"a": sum_of.a, "b": sum_of.b}
    return _plain(adapters[0], trainable, sites, rows)


def compress(adapter: Adapter, rank: int) -> Approximated:
    """The best adapter of at most `rank` everywhere (Eckart & Young 1936), and its error.

    Raises `RequestError` for a rank above the present one, or a method whose change is not
    low-rank.
    """
    plain = to_lora(adapter)
    if not isinstance(plain.method, LoRA):
        raise RequestError(
            f"the adapter of {type(adapter.method).__name__} has no low-rank part to compress; "
            "what it trains whole stays as it is"
        )
    sites = plain.method.sites(plain.params)
    highest = max((site.rank for site in sites.values()), default=0)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= highest:
        raise RequestError(
            f"rank is {rank!r}, and the adapter has rank {highest}: compressing takes a whole "
            f"number from 1 to {highest}; a higher rank would add nothing"
        )
    trainable, kept, errors, norms = dict(plain.trainable), {}, {}, {}
    for name, site in sites.items():
        entry = plain.trainable[name]
        narrow = _with_rank(site, min(rank, site.rank))
        a, b, sigma = _svd_of_factors(entry["a"], entry["b"], site)
        kept[name] = narrow
        trainable[name] = _balanced(a, sigma, b, narrow)
        norms[name] = _norm(sigma)
        errors[name] = _norm(sigma[..., narrow.rank :])
    rows = {path: indices for path, (_, indices) in plain.method._rows(plain.params).items()}
    smaller = _plain(plain, trainable, kept, rows)
    return _approximated(smaller, errors, norms)


def difference(
    tuned: PyTree,
    base: PyTree,
    *,
    targets: str | Sequence[str],
    rank: int,
    axes: Mapping[str, KernelAxes] | None = None,
    train: str | Sequence[str] = (),
    aliases: Aliases | None = None,
) -> Approximated:
    """The LoRA adapter nearest to what separates two models: from full fine-tuning, or a merge.

    `tuned` and `base` are trees of the same parameters. `targets`, `rank`, `axes` and `aliases` are
    as in `LoRA`; parameters that `train` names are carried whole (biases, norms, a head). Says in
    `left_out` what differs and is in neither. Raises `RequestError` if the trees disagree.
    """
    before, after = (dict(trees.flatten(tree).items()) for tree in (base, tuned))
    shapes = [{p: tuple(np.shape(x)) for p, x in tree.items()} for tree in (before, after)]
    if shapes[0] != shapes[1]:
        path = next(p for p in {**shapes[0], **shapes[1]} if shapes[0].get(p) != shapes[1].get(p))
        raise RequestError(
            f"the models differ at {path!r}: {shapes[0].get(path, 'missing')} in the base, "
            f"{shapes[1].get(path, 'missing')} in the other; give two trees of one model"
        )
    method = LoRA(targets=targets, rank=rank, axes=axes, train=train, aliases=aliases)
    sites = method.sites(base)
    whole = method.whole_paths(base)
    # What is not compared may hold anything: a mask's minus infinity, a statistic that is NaN.
    for tree, which in ((before, "base"), (after, "tuned model")):
        for path in (*sites, *whole):
            if not bool(jnp.isfinite(tree[path]).all()):
                raise RequestError(
                    f"{path!r} of the {which} holds NaN or infinity; give two finite models"
                )
    trainable: Trainable = {path: {"value": after[path]} for path in whole}
    errors, norms = {}, {}
    for name, site in sites.items():
        wide = float32_or_wider(before[name].dtype)
        delta = after[name].astype(wide) - before[name].astype(wide)
        p, sigma, q = jnp.linalg.svd(to_matrices(delta, site), full_matrices=False)
        trainable[name] = _balanced(p, sigma, q, site)
        norms[name] = _norm(sigma)
        errors[name] = _norm(sigma[..., site.rank :])
    rest = [p for p, x in before.items() if trees.is_array(x) and p not in {*sites, *whole}]
    left_out = tuple(path for path in rest if not _are_equal(before[path], after[path]))
    found = Adapter(method, trainable, base)
    return _approximated(_plain(found, trainable, sites, {}), errors, norms, left_out)


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two arrays hold the same numbers, NaN in the same places included."""
    one, other = np.asarray(one), np.asarray(other)
    same_bits = one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return same_bits or np.array_equal(one, other)


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise RequestError(
            f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise RequestError(f"weight {weight!r} is not a finite number")
    hashes = [adapter.base_hash for adapter in adapters]
    if len(set(hashes)) > 1:
        raise RequestError(
            "the adapters are of different bases (hashes "
            f"{', '.join(sorted({text[:12] for text in hashes}))}): a sum of their changes belongs "
            "to neither; train them on one base"
        )


def _plain(like: Adapter, trainable: Trainable, sites: Mapping[str, Site], rows) -> Adapter:
    """A plain LoRA adapter with scale 1 at these sites."""
    rules = [
        Rule(re.escape(site.path), site.rank, float(site.rank), slice=site.rule.slice)
        for site in sites.values()
    ]
    whole = [re.escape(path) for path, entry in trainable.items() if "value" in entry]
    shared = {"train": whole, "rows": {re.escape(path): own for path, own in rows.items()}}
    axes = {site.path: KernelAxes.from_roles(site.roles) for site in sites.values()}
    method = LoRA(rules=rules, axes=axes, **shared) if rules else Method(**shared)
    return Adapter(method, trainable, like.params, like.base_hash)


def _with_rank(site: Site, rank: int) -> Site:
    rule = dataclasses.replace(site.rule, rank=rank, alpha=float(rank))
    return dataclasses.replace(site, rule=rule)


def _svd_of_factors(a, b, site: Site):
    """The SVD of a @ b as matrices: p (s…, I, k), q (s…, k, O) and sigma (s…, k)."""
    rank = a.shape[-1]
    stack = site.sizes("s")
    b = jnp.swapaxes(b.reshape(*stack, rank, site.size("o")), -1, -2)
    q_a, r_a = one_by_one(jnp.linalg.qr, a.reshape(*stack, site.size("i"), rank))
    q_b, r_b = one_by_one(jnp.linalg.qr, b)
    p, sigma, q = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    # What is below the rounding of the product is zero: changes that cancel leave no noise behind.
    norms = [jnp.linalg.norm(r, axis=(-2, -1), keepdims=True)[..., 0] for r in (r_a, r_b)]
    floor = jnp.finfo(sigma.dtype).eps * rank * norms[0] * norms[1]
    sigma = jnp.where(sigma > floor, sigma, 0)
    return q_a @ p, jnp.swapaxes(q_b @ jnp.swapaxes(q, -1, -2), -1, -2), sigma


def _balanced(p, sigma, q, site: Site) -> dict[str, jax.Array]:
    """a and b with the root of each singular value in both, at the site's rank."""
    rank = site.rank
    root = jnp.sqrt(sigma[..., :rank])
    a = p[..., :rank] * root[..., None, :]
    b = q[..., :rank, :] * root[..., :, None]
    return {"a": a.reshape(site.part_shape("sir")), "b": b.reshape(site.part_shape("sro"))}


def _norm(sigma) -> float:
    return float(np.linalg.norm(np.asarray(sigma, np.float64)))


def _approximated(adapter, errors, norms, left_out=()) -> Approximated:
    # An error is at most its norm: where that is 0, both are.
    relative = {name: errors[name] / (norms[name] or 1.0) for name in errors}
    total = math.hypot(*errors.values()) / (math.hypot(*norms.values()) or 1.0)
    return Approximated(adapter, relative, total, left_out)
