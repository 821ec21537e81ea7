"""LoRA whose factors lie in one random subspace: all of them from one trained vector.

(a, b of every kernel, end to end) = start + P θ, θ (d,) trains, P is fixed and random. The
intrinsic dimension of a task measured inside LoRA's parameters, and a method of its own: Li et al.
2025, "Uni-LoRA: One Vector is All You Need" (arXiv:2506.00799), Eq. 2 and Section 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.methods.base import PROBED, PyTree, Trainable
from lora_jax.methods.lora import LoRA
from lora_jax.methods.projections import fastfood, grouped
from lora_jax.methods.sites import Site
from lora_jax.methods.starts import draw, key_of_name
from lora_jax.methods.subspace import Subspace, key_of

NAME = "uni_lora"
# θ starts in ±0.02, as in the authors' code and peft's: with all at zero nothing would have a
# gradient.
BOUND = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniLoRA(Subspace):
    """LoRA of `rank` on the kernels that `targets` match, all factors P θ with θ `(dim,)`.

    `projection`: "grouped", Uni-LoRA's own (one entry a row of P), or "fastfood", whose subspaces
    are nested in dim. `start`: "uniform", factors P θ with θ in ±0.02, as the source has it, so
    that a fresh adapter changes the model a little; or "lora", LoRA's random `a` and zero `b`
    beneath and θ = 0, so that it does not. `alpha`, `dropout`, `axes` are LoRA's.

    `trainable["uni_lora"]` holds `theta` (see `Subspace`). It cannot be combined with others.
    `to_lora` gives the adapters as LoRA's, to save, analyse or merge. Raises `RequestError` for
    values outside.

    >>> params = {"kernel": jnp.ones((6, 4))}
    >>> method = UniLoRA(targets="kernel", rank=2, dim=5)
    >>> trainable, frozen = method.init(jax.random.key(0), params)
    >>> trainable["uni_lora"]["theta"].shape, method.table(params).num_trainable
    ((5,), 5)
    >>> lora, adapters = method.to_lora(trainable, params)
    >>> adapters["kernel"]["a"].shape, adapters["kernel"]["b"].shape
    ((6, 2), (2, 4))
    """

    targets: str | Sequence[str] = ()
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    dim: int = 256
    projection: str = "grouped"
    start: str = dataclasses.field(
        default="uniform", metadata={"help": "uniform or lora: how θ starts"}
    )
    axes: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False, hash=False)

    TITLE: ClassVar = "Uni-LoRA"
    NAME: ClassVar = NAME
    PROJECTIONS: ClassVar = {"grouped": grouped, "fastfood": fastfood}
    CHOICES: ClassVar = {"projection": PROJECTIONS, "start": ("uniform", "lora")}

    def __post_init__(self):
        super().__post_init__()
        if self.rows:
            raise RequestError("UniLoRA has no rows=; train them whole (train=), or use LoRA")
        if not self.targets:
            raise RequestError("UniLoRA needs targets=…, the kernels that it adapts")
        self._lora  # noqa: B018  (for its checks)

    @functools.cached_property
    def _lora(self) -> LoRA:
        return LoRA(
            targets=self.targets,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            axes=self.axes,
            train=self.train,
            aliases=self.aliases,
        )

    def to_lora(self, trainable: Trainable, params: PyTree) -> tuple[LoRA, Trainable]:
        """The same adapters as LoRA's: `(method, trainable)` with `a` and `b` of every kernel.

        `params` is the full tree or what `init` left frozen.
        """
        rest = {name: entry for name, entry in trainable.items() if name != NAME}
        return self._lora, {**rest, **self._factors(trainable[NAME], params, frozenset(rest))}

    def _factors(self, entry, params: PyTree, whole: frozenset[str]) -> dict[str, dict[str, Any]]:
        if set(entry) != {"theta", *self.FROZEN_PARTS} or entry["theta"].shape != (self.dim,):
            raise RequestError(
                f"{NAME!r} holds {sorted(entry)} with {entry['theta'].size} dimensions, dim is "
                f"{self.dim}; use the method that made it"
            )
        sites = self._lora.sites(params, whole)
        values = self._steps(entry, _sizes_of(sites))
        key = key_of(entry["key"])
        found: dict[str, dict[str, Any]] = {}
        for name, site in sites.items():
            parts = {
                part: values[f"{name}:{part}"].reshape(site.part_shape(spec))
                for part, spec in LoRA.PARTS.items()
            }
            if self.start == "lora":
                start = self._begun(key, site)
                parts = {part: value + start[part] for part, value in parts.items()}
            found[name] = parts
        return found

    @partitionable()
    def _begun(self, key: jax.Array, site: Site) -> dict[str, jax.Array]:
        """LoRA's own start, drawn again whenever it is bound: the file holds θ alone."""
        a = draw(key_of_name(key, site.name), site.rule.init, site, jnp.float32)
        return {"a": jax.lax.stop_gradient(a), "b": jnp.zeros(site.part_shape("sro"), a.dtype)}

    @partitionable()
    def drawn(self, trainable: Trainable) -> dict[str, list[float]]:
        entry = trainable[NAME]
        found = super().drawn(trainable)
        if self.start == "lora":
            start = jax.random.fold_in(key_of(entry["key"]), 0)
            found["a"] = jax.random.uniform(start, (PROBED,), jnp.float32).tolist()
        return found

    @partitionable()
    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        sizes = self._sizes(params, whole)
        total = sum(sizes.values())
        if total < self.dim:
            raise RequestError(
                f"dim is {self.dim}, but the adapters have {total:,} parameters at rank "
                f"{self.rank}; choose a smaller one"
            )
        of_theta, key = jax.random.split(key)
        theta = jnp.zeros(self.dim, jnp.float32)
        if self.start == "uniform":
            theta = jax.random.uniform(of_theta, theta.shape, theta.dtype, -BOUND, BOUND)
        return self._entry(key, sizes, theta=theta)

    def _sizes(self, params: PyTree, whole: frozenset[str]) -> dict[str, int]:
        return _sizes_of(self._lora.sites(params, whole))

    def _bind_over(self, trainable, frozen, *, key, data, beneath) -> PyTree:
        if NAME in trainable:
            trainable = self.to_lora(trainable, frozen)[1]
        return self._lora._bind_over(trainable, frozen, key=key, data=data, beneath=beneath)

    def _skipped(self, params, whole: frozenset[str]) -> list[str]:
        return self._lora._skipped(params, whole)

    def _check_no_dropout(self) -> None:
        self._lora._check_no_dropout()


def _sizes_of(sites: Mapping[str, Site]) -> dict[str, int]:
    """`{"path:a": number of entries}`, a before b, in the tree's order: the order in P's rows."""
    return {
        f"{name}:{part}": math.prod(site.part_shape(spec))
        for name, site in sites.items()
        for part, spec in LoRA.PARTS.items()
    }
