"""quax: `LoraArray`s in the parameters, the model under `quax.quaxify` (its LoRA example library).

A `LoraArray` is W + A·B on the last two axes of an array, with no scale; other axes are batch. What
it has no rule for raises, or is materialised with `allow_materialise=True`; both are tried.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from quax.examples.lora import LoraArray, loraify

from experiments.peers import functional
from experiments.peers.cases import RANK, Case
from experiments.peers.judge import Adapted, Way
from tests.core import constructs

PACKAGES = ("quax", "equinox", "jax")
NAME = "quax"


def ways(case: Case):
    """Ways of writing a case: the model as it is, then with `quaxify` around its products alone."""
    if case.slices:
        build = _unfused
    elif case.framework == "equinox":
        build = _loraified
    else:
        build = _whole
    yield Way("quaxify the model", lambda params, x: build(case, params, False))
    yield Way(
        "quaxify the model, allow_materialise=True", lambda params, x: build(case, params, True)
    )
    if case.name in BY_HAND:
        yield Way("quaxify each product", lambda params, x: _products(case, params), True)


def _whole(case, params, allow) -> Adapted:
    model = functional.model_of(case, params)
    arrays = {kernel: _lora(params[kernel], allow) for kernel in case.roles}

    def run(factors, x):
        return quax.quaxify(model.apply)(model.put(model.tree, _with_factors(arrays, factors)), x)

    return Adapted(_factors(arrays), run, lambda _, pair: pair["a"] @ pair["b"])


def _loraified(case, params, allow) -> Adapted:
    """The documented way for Equinox: `loraify` replaces the weight of every `eqx.nn.Linear`."""
    model = functional.model_of(case, params)
    tree = loraify(model.tree, rank=RANK, allow_materialise=allow, key=jax.random.key(0))
    kernels = dict(zip(case.roles, (layer.weight for layer in tree.layers), strict=True))

    def run(factors, x):
        return quax.quaxify(model.apply)(model.put(tree, _with_factors(kernels, factors)), x)

    return Adapted(_factors(kernels), run, lambda _, pair: pair["a"] @ pair["b"])


def _unfused(case, params, allow) -> Adapted:
    """A slice has no `LoraArray` of its own: the kernel is kept in parts, concatenated inside."""
    kernel = params["w"]
    axis = case.slices[0][0]
    width = case.slices[0][2] - case.slices[0][1]
    parts = dict(enumerate(jnp.split(kernel, kernel.shape[axis] // width, axis=axis)))
    chosen = [start // width for _, start, _ in case.slices]
    arrays = {part: _lora(parts[part], allow) for part in chosen}

    def fused(parts, x):
        return case.apply({"w": jnp.concatenate([parts[n] for n in sorted(parts)], axis=axis)}, x)

    def run(factors, x):
        named = {n: factors[f"w:{n}"] for n in chosen}
        return quax.quaxify(fused)(parts | _with_factors(arrays, named), x)

    def update(name, pair):
        zero = jnp.zeros_like(parts[0])
        made = {int(name.partition(":")[2]): pair["a"] @ pair["b"]}
        return jnp.concatenate([made.get(n, zero) for n in parts], axis=axis)

    factors = {f"w:{n}": pair for n, pair in _factors(arrays).items()}
    return Adapted(factors, run, update, "with the kernel kept in three parts")


def _remat(p, x, dot):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def f(w, x):
        return jnp.tanh(checkpoint_name(jnp.tanh(dot(x, w)), "hidden")) ** 2

    return jax.checkpoint(f, policy=policy)(p["w"], x)


def _scan_remat(p, x, dot):
    policy = jax.checkpoint_policies.dots_saveable
    step = jax.checkpoint(lambda h, w: (jnp.tanh(dot(h, w)), None), policy=policy)
    return jax.lax.scan(step, x, p["w"])[0]


def _by_index(p, x, dot):
    def step(n, h):
        return jnp.tanh(dot(h, jax.tree.map(lambda leaf: leaf[n], p["w"])))

    return jax.lax.fori_loop(0, 3, step, x)


def _after(name: str):
    """A construct that acts on the product's result: its model, with the identity as the kernel."""

    def f(p, x, dot):
        h = dot(x, p["w"])
        return constructs.ALL[name].apply({"w": jnp.eye(h.shape[-1], dtype=h.dtype)}, h)

    return f


def _shard_map_around(p, x, dot):
    split, whole = PartitionSpec(None, "data"), PartitionSpec()
    return jax.shard_map(
        dot,
        mesh=constructs._mesh(),
        out_specs=split,
        in_specs=(whole, _parts(p, split, whole, split)),
    )(x, p["w"])


def _shard_map_over_inputs(p, x, dot):
    split, whole = PartitionSpec("data", None), PartitionSpec()
    return jax.shard_map(
        lambda x, w: jax.lax.psum(dot(x, w), "data"),
        mesh=constructs._mesh(),
        in_specs=(PartitionSpec(None, "data"), _parts(p, split, split, whole)),
        out_specs=whole,
        check_vma=False,  # with it, JAX puts a `pvary` on the kernel, which quax materialises for
    )(x, p["w"])


def _parts(p, w, a, b):
    """The same `LoraArray` holding these in place of its arrays."""
    return eqx.tree_at(lambda array: (array._w, array.a, array.b), p["w"], (w, a, b))


def _constraint(p, x, dot):
    place = NamedSharding(constructs._mesh(), PartitionSpec(None, "data"))
    w = jax.lax.with_sharding_constraint(p["w"], place)
    return jax.lax.with_sharding_constraint(dot(x, w), place)


def _experts(p, x, dot):
    gates = jax.nn.softmax(x[:, :2], axis=-1)
    hidden = jnp.tanh(jax.vmap(dot, in_axes=(None, 0))(x, p["w"]))
    return jnp.einsum("ebi,be->bi", jax.vmap(dot)(hidden, p["o"]), gates)


# `LoraArray`s are pytrees, so they pass through JAX's own transformations to the products.
BY_HAND = {
    "mixture_of_experts": _experts,
    "scanned_with_remat": _scan_remat,
    "layers_by_index": _by_index,
    "remat_policy_by_name": _remat,
    "vmap_inside": lambda p, x, dot: jax.vmap(lambda row: dot(row, p["w"]))(x),
    "custom_vjp_beside": lambda p, x, dot: constructs._attend(*(dot(x, p[n]) for n in "qkv")),
    "pallas_beside": _after("pallas_beside"),
    "shard_map_beside": _after("shard_map_beside"),
    "shard_map_around": _shard_map_around,
    "shard_map_over_inputs": _shard_map_over_inputs,
    "sharding_constraint": _constraint,
}


def _products(case, params) -> Adapted:
    arrays = {kernel: _lora(params[kernel], allow=False) for kernel in case.roles}

    def run(factors, x):
        return BY_HAND[case.name](_with_factors(arrays, factors), x, quax.quaxify(jnp.matmul))

    return Adapted(_factors(arrays), run, lambda _, pair: pair["a"] @ pair["b"])


def _lora(kernel, allow: bool) -> LoraArray:
    return LoraArray(kernel, rank=RANK, allow_materialise=allow, key=jax.random.key(0))


def _factors(arrays):
    return {kernel: {"a": array.a, "b": array.b} for kernel, array in arrays.items()}


def _with_factors(arrays, factors):
    return {
        kernel: eqx.tree_at(
            lambda array: (array.a, array.b), array, (factors[kernel]["a"], factors[kernel]["b"])
        )
        for kernel, array in arrays.items()
    }
