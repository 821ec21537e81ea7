"""Several adapters at once: on one model side by side, on one weight, or trained together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.methods.base import Method, PyTree, Trainable
from lora_jax.methods.merging import merged
from lora_jax.methods.sites import are_apart, path_of
from lora_jax.methods.table import MethodTable


def bind_all(
    adapters: Sequence[tuple[Method, Trainable]], frozen: PyTree, *, key: jax.Array | None = None
) -> PyTree:
    """The params tree with several adapters bound, each with its own scale; they may share weights.

    What is computed is W + ΔW₁ + ΔW₂ + …, each through its factors; a DoRA, first on its weight,
    scales W and its own ΔW only, and the others add to that.

    Args:
      adapters: `(method, trainable)` of each.
      frozen: what `init` left of the base, or the full tree.
      key: turns dropout on, with masks of its own for each.

    Returns:
      The tree for a lifted model.

    Raises:
      RequestError: a parameter that one trained whole is touched by another, or a DoRA is not the
        first on its weight: its norm is of the base.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"w": jnp.eye(4)}
    >>> first, second = lj.LoRA(targets="w", rank=1), lj.RsLoRA(targets="w", rank=2)
    >>> adapters = [(m, m.init(jax.random.key(0), params)[0]) for m in (first, second)]
    >>> tree = bind_all(adapters, params)
    >>> lj.lift(lambda p, x: x @ p["w"])(tree, jnp.ones((1, 4))).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    if not adapters:
        raise RequestError("bind_all got no adapters; bind at least one, or use the tree itself")
    _check_go_together([method for method, _ in adapters])
    seen: dict[str, bool] = {}
    for _, trainable in adapters:
        is_whole = {path_of(name): "value" in entry for name, entry in trainable.items()}
        for path in is_whole:
            if path in seen and (is_whole[path] or seen[path]):
                raise RequestError(
                    f"{path!r} is trained whole by one of these adapters and touched by another; "
                    "a parameter can be replaced only once"
                )
        seen |= is_whole
    tree, beneath = frozen, {}
    for number, (method, trainable) in enumerate(adapters):
        own = None if key is None else jax.random.fold_in(key, number)
        tree = method._bind_over(trainable, tree, key=own, data={}, beneath=beneath)
    return tree


def _check_go_together(methods: Sequence[Method]) -> None:
    alone = [type(method).__name__ for method in methods if method.EXCLUSIVE]
    if alone and len(methods) > 1:
        raise RequestError(
            f"{alone[0]} moves all its parameters together and cannot be combined; name those "
            "that train whole in its own train=, or merge one and bind the other to the result"
        )


def merge_all(
    adapters: Sequence[tuple[Method, Trainable]], frozen: PyTree, *, dtype: Any = None
) -> PyTree:
    """Plain parameters with several adapters folded in, rounded once.

    Args:
      adapters: as for `bind_all`.
      frozen: likewise.
      dtype: as in `Method.merge`.

    Returns:
      The tree of plain arrays.

    Raises:
      RequestError: as `bind_all` and `Method.merge` do.
    """
    if len(adapters) == 1:
        return adapters[0][0].merge(adapters[0][1], frozen, dtype=dtype)
    for method, _ in adapters:
        method.check_merges()
    return merged(bind_all(adapters, frozen), dtype)


@dataclasses.dataclass(frozen=True, init=False)
class Combined(Method):
    """Several methods trained as one, each on parameters of its own: LoRA here, DoRA there.

    It is a `Method` like any other: one train step, one checkpoint, one adapter. Raises
    `RequestError`, in `init`, where two of them would take the same parameter.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> both = Combined([lj.LoRA(targets="q", rank=2), lj.DoRA(targets="v", rank=1, train="head")])
    >>> params = {name: jnp.ones((4, 4)) for name in ("q", "v", "head")}
    >>> sorted(both.init(jax.random.key(0), params)[0])
    ['head', 'q', 'v']
    """

    methods: tuple[Method, ...] = ()

    def __init__(self, methods: Sequence[Method]):
        if len(methods) < 2:
            raise RequestError(f"Combined takes two methods or more, not {len(methods)}")
        super().__init__()
        _check_go_together(methods)
        object.__setattr__(self, "methods", tuple(methods))

    def init(self, key: jax.Array, params: PyTree) -> tuple[Trainable, PyTree]:
        self._check_apart(params)
        trainable: Trainable = {}
        for method in self.methods:
            trainable |= method.init(key, params)[0]
        whole = [path for path, entry in trainable.items() if "value" in entry]
        return trainable, trees.take(params, whole)[1]

    def table(self, params: PyTree) -> MethodTable:
        self._check_apart(params)
        return super().table(params)

    def _check_apart(self, params: PyTree) -> None:
        taken: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
        kinds = [type(method).__name__ for method in self.methods]
        for number, method in enumerate(self.methods):
            for name in (row.path for row in method.table(params).rows):
                for other, owner in taken[path_of(name)]:
                    if owner != number and not are_apart(name, other):
                        raise RequestError(
                            f"{name!r} is taken by rules of {kinds[owner]} and of "
                            f"{kinds[number]}; exclude it from one of them "
                            "(Rule(exclude=…)), or give each a slice of its own"
                        )
                taken[path_of(name)].append((name, number))

    def whole_paths(self, params: PyTree) -> list[str]:
        return [path for method in self.methods for path in method.whole_paths(params)]

    def drawn(self, trainable: Trainable) -> dict[str, list[float]]:
        found = [method.drawn(trainable) for method in self.methods]
        return {f"{n}:{name}": row for n, own in enumerate(found) for name, row in own.items()}

    def owns(self, name: str) -> bool:
        return any(method.owns(name) for method in self.methods)

    def owner_of(self, name: str) -> Method:
        # What none of them adapts is trained whole, where all of them do the same.
        owner = next((method for method in self.methods if method.owns(name)), self.methods[0])
        return owner.owner_of(name)

    def members(self) -> tuple[Method, ...]:
        return tuple(one for method in self.methods for one in method.members())
