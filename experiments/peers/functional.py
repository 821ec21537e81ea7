"""Each case as a tree of parameters and a function of it, whatever the framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from experiments.peers.cases import Case


@dataclasses.dataclass(frozen=True)
class Model:
    """`apply(tree, x)`; `put(tree, {kernel: value})` replaces kernels, which lie at `paths`."""

    tree: Any
    apply: Callable
    put: Callable
    paths: dict[str, tuple[str, ...]]


def model_of(case: Case, params) -> Model:
    """The case as its framework has it, holding `params`."""
    return {"plain": _plain, "nnx": _nnx, "linen": _linen, "equinox": _equinox}[case.framework](
        case, params
    )


def _plain(case, params) -> Model:
    paths = {kernel: (kernel,) for kernel in params}
    return Model(params, case.apply, lambda tree, new: {**tree, **new}, paths)


def _nnx(case, params) -> Model:
    from flax import nnx

    from experiments.peers import nnx_models

    model, where = nnx_models.make_model(case.name, params)
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    paths = {kernel: (*path, leaf) for kernel, (path, leaf) in where.items()}

    def apply(tree, x):
        # Statistics and keys change in the call, so their variables are made in its trace.
        held = jax.tree.map(lambda leaf: leaf, rest)
        return nnx_models.outputs_of(nnx.merge(graph, nnx.State(tree), held), x)

    return Model(nnx.to_pure_dict(state), apply, _putter(paths), paths)


def _linen(case, params) -> Model:
    from experiments.peers import linen_models

    dtype = next(iter(params.values())).dtype.name
    model, where = linen_models.make_model(case, dtype)
    paths = {kernel: ("params", *path) for kernel, path in where.items()}
    put = _putter(paths)
    return Model(put({}, params), model.apply, put, paths)


def _putter(paths):
    def put(tree, new):
        for kernel, value in new.items():
            tree = _replaced(tree, paths[kernel], value)
        return tree

    return put


def _replaced(tree, path, value):
    if not path:
        return value
    return {**tree, path[0]: _replaced(tree.get(path[0], {}), path[1:], value)}


def _equinox(case, params) -> Model:
    import equinox as eqx

    dtype = next(iter(params.values())).dtype
    model = eqx.nn.MLP(
        6, 6, 8, 1, activation=jax.numpy.tanh, use_bias=False, use_final_bias=False,
        dtype=dtype, key=jax.random.key(0),
    )  # fmt: skip
    index = {kernel: n for n, kernel in enumerate(params)}

    def put(tree, new):
        return eqx.tree_at(
            lambda model: [model.layers[index[kernel]].weight for kernel in new],
            tree,
            list(new.values()),
        )

    paths = {kernel: ("layers", str(n), "weight") for kernel, n in index.items()}
    return Model(put(model, params), lambda model, x: jax.vmap(model)(x), put, paths)
