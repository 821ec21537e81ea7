"""LoRA: a frozen kernel and a trained low-rank update (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import trees
from lora_jax.core.apply import scale_of
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule, match_rules, pattern_of
from lora_jax.core.weights import LoRAWeight, is_adapted
from lora_jax.methods.base import Method, Trainable
from lora_jax.methods.table import Row


@dataclasses.dataclass(frozen=True, init=False)
class LoRA(Method):
    """ΔW = (alpha / rank) · a @ b on every kernel that a rule matches; the kernel stays frozen.

    Either `targets` with `rank`, `alpha`, `dropout`, `init` (see `Rule`), or `rules`: an ordered
    sequence of `Rule`, first match wins. `train` names parameters trained whole beside (a head);
    what it names gets no adapter. `axes` is what `kernel_axes` gave; without it a kernel of two
    axes is (in, out) and one of more is an error.

    `a` is (stack…, in…, r), `b` is (stack…, r, out…), in float32 or the kernel's dtype if wider.

    >>> params = {"kernel": jnp.ones((6, 4))}
    >>> method = LoRA(targets="kernel", rank=2, alpha=4)
    >>> trainable, frozen = method.init(jax.random.key(0), params)
    >>> {name: factor.shape for name, factor in trainable["kernel"].items()}
    {'a': (6, 2), 'b': (2, 4)}
    """

    rules: tuple[Rule, ...] = ()
    axes: Mapping[str, KernelAxes] | None = dataclasses.field(default=None, repr=False)

    def __init__(
        self,
        *,
        targets: str | Sequence[str] | None = None,
        rules: Sequence[Rule] | None = None,
        axes: Mapping[str, KernelAxes] | None = None,
        train: str | Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        **settings,
    ):
        known = {field.name for field in dataclasses.fields(Rule)} - {"targets"}
        for name in settings:
            if name not in known:
                raise RequestError(f"LoRA has no setting {name!r}; {trees.nearest(name, known)}")
        if (targets is None) == (rules is None):
            raise RequestError("LoRA takes either targets=… (one rule) or rules=[Rule(…), …]")
        if rules is None:
            rules = [Rule(targets, **settings)]
        elif settings:
            raise RequestError(
                f"{next(iter(settings))!r} belongs into each Rule when rules= is used"
            )
        if not rules:
            raise RequestError("rules is empty; name at least one target, or use HeadOnly")
        super().__init__(train=train, aliases=aliases)
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "axes", axes)

    def adapted(self, params) -> dict[str, tuple[Rule, str]]:
        """`{path: (rule, roles)}` for each parameter that gets an adapter, in the tree's order.

        Raises `RequestError` for a rule that matches nothing, a rank above the matrix, or a kernel
        of more than two axes without `axes`.
        """
        return self._adapted(params, frozenset(self.whole_paths(params)))

    def _adapted(self, params, whole: frozenset[str]) -> dict[str, tuple[Rule, str]]:
        leaves = dict(trees.flatten(params).items())
        candidates = [
            path
            for path, leaf in leaves.items()
            if trees.is_float(leaf) and leaf.ndim >= 2 and path not in whole
        ]
        everything = [path for path, leaf in leaves.items() if trees.is_array(leaf)]
        patterns = [pattern_of(rule.targets, self.aliases) for rule in self.rules]
        matched = match_rules(patterns, candidates, everything)
        adapted = {}
        for path, index in matched.items():
            rule, shape = self.rules[index], leaves[path].shape
            roles = self._roles(path, len(shape))
            widest = min(_size(shape, roles, "i"), _size(shape, roles, "o"))
            if rule.rank > widest:
                raise RequestError(
                    f"rank {rule.rank} is above the full rank {widest} of {path!r} {tuple(shape)}; "
                    f"choose a rank of at most {widest} or leave this parameter out"
                )
            adapted[path] = (rule, roles)
        return adapted

    def _roles(self, path: str, ndim: int) -> str:
        axes = None if self.axes is None else self.axes.get(path)
        if axes is not None:
            return axes.roles(ndim, path)
        if ndim == 2:
            return "io"
        raise RequestError(
            f"{path!r} has {ndim} axes and nothing says which are input and output; pass "
            "axes=lora_jax.kernel_axes(apply, params, *inputs), or your own "
            "{path: KernelAxes(stack=…, in_=…, out=…)}"
        )

    def _init_adapters(self, key, params, whole: frozenset[str]) -> Trainable:
        leaves = dict(trees.flatten(params).items())
        return {
            path: _init_factors(_path_key(key, path), leaves[path], rule, roles)
            for path, (rule, roles) in self._adapted(params, whole).items()
        }

    def _bind_adapter(self, path, kernel, entry, key):
        if is_adapted(kernel):
            raise RequestError(f"{path!r} is bound already; bind the tree that `init` returned")
        rule = self._rule_of(path)
        roles = self._roles(path, kernel.ndim)
        stack = tuple(n for n, role in zip(kernel.shape, roles, strict=True) if role == "s")
        if key is not None:
            key = jax.random.split(_path_key(key, path), stack) if stack else _path_key(key, path)
        dtype = entry["a"].dtype
        dropped = key is not None and rule.dropout > 0.0
        return LoRAWeight(
            kernel=kernel,
            a=entry["a"],
            b=entry["b"],
            scale=np.full(stack, scale_of(rule.alpha, rule.rank), dtype),
            key=key if dropped else None,
            dropout=np.full(stack, rule.dropout, dtype) if dropped else None,
            roles=roles,
            path=path,
        )

    def _rule_of(self, path: str) -> Rule:
        for rule in self.rules:
            if pattern_of(rule.targets, self.aliases).fullmatch(path):
                return rule
        raise RequestError(
            f"no rule of this method matches the adapter {path!r}; use its own method"
        )

    def _adapter_rows(self, params, whole: frozenset[str]) -> list[Row]:
        shapes = {
            path: tuple(leaf.shape)
            for path, leaf in trees.flatten(params).items()
            if trees.is_array(leaf)
        }
        rows = []
        for path, (rule, roles) in self._adapted(params, whole).items():
            shape = shapes[path]
            per_matrix = rule.rank * (_size(shape, roles, "i") + _size(shape, roles, "o"))
            count = _size(shape, roles, "s") * per_matrix
            rows.append(Row(path, shape, rule.rank, scale_of(rule.alpha, rule.rank), count))
        return rows


def _size(shape, roles: str, role: str) -> int:
    return math.prod(n for n, r in zip(shape, roles, strict=True) if r == role)


def _path_key(key, path: str):
    """A key of the path alone: adding a target leaves the others' draws as they were."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _init_factors(key, kernel, rule: Rule, roles: str) -> dict[str, jax.Array]:
    """`a` drawn column by column and `b` zero.

    Each of the r columns of `a` has a key of its own, so that an adapter padded to a wider rank
    starts as its unpadded twin.
    """
    sizes = {
        r: [n for n, role in zip(kernel.shape, roles, strict=True) if role == r] for r in "sio"
    }
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    bound = 1.0 / math.sqrt(math.prod(sizes["i"]))
    shape = (*sizes["s"], *sizes["i"])

    def column(index):
        column_key = jax.random.fold_in(key, index)
        if rule.init == "gaussian":
            return bound * jax.random.normal(column_key, shape, dtype)
        # Kaiming-uniform with a=√5, as microsoft/LoRA and PEFT draw it, is U(-1/√in, 1/√in).
        return jax.random.uniform(column_key, shape, dtype, -bound, bound)

    a = jnp.moveaxis(jax.vmap(column)(jnp.arange(rule.rank)), 0, -1)
    return {"a": a, "b": jnp.zeros((*sizes["s"], rule.rank, *sizes["o"]), dtype)}
