"""The cases as NNX modules, as a user of Flax would write them.

`layer(w)` makes the layer that holds a kernel (in, out): `nnx.Linear` here, a LoRA layer where a
tool replaces layers by hand. `MODELS[case]` is `(make, paths)`: `make(params, layer)` gives the
module, `paths` where each kernel's module is in it and the name of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from tests.core import constructs


def plain_layer(w) -> nnx.Linear:
    layer = nnx.Linear(*w.shape, use_bias=False, param_dtype=w.dtype, rngs=nnx.Rngs(0))
    return filled(layer, kernel=w)


def filled(module, **values):
    """The module, its parameters set."""
    for name, value in values.items():
        getattr(module, name)[...] = value
    return module


def outputs_of(model, x):
    """What a case compares: the call's result, and the state that the call must have moved."""
    y = model(x)
    return (y, *model.moved()) if hasattr(model, "moved") else y


class Each(nnx.Module):
    """One layer for each kernel, and a function `f(layers, x)` that applies them."""

    def __init__(self, params, layer, f: Callable):
        self.f = f
        self.names = tuple(params)
        for name, w in params.items():
            setattr(self, name, layer(w))

    def __call__(self, x):
        return self.f({name: getattr(self, name) for name in self.names}, x)


def stacked(w, layer):
    """Layers with a leading axis, as `nnx.vmap` over their constructor gives them."""
    return nnx.vmap(layer, in_axes=0, out_axes=0)(w)


class Scanned(nnx.Module):
    def __init__(self, params, layer, *, remat: bool = False):
        self.layers = stacked(params["w"], layer)
        self.remat = remat

    def __call__(self, x):
        def step(h, layer):
            return jnp.tanh(layer(h))

        if self.remat:
            step = nnx.remat(step, policy=jax.checkpoint_policies.dots_saveable)
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class ByIndex(nnx.Module):
    def __init__(self, params, layer):
        self.layers = stacked(params["w"], layer)

    def __call__(self, x):
        graph, state = nnx.split(self.layers)

        def step(n, h):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[n], state))
            return jnp.tanh(layer(h))

        return jax.lax.fori_loop(0, 3, step, x)


class Experts(nnx.Module):
    def __init__(self, params, layer):
        self.w, self.o = stacked(params["w"], layer), stacked(params["o"], layer)

    def __call__(self, x):
        gates = jax.nn.softmax(x[:, :2], axis=-1)
        one = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))
        return jnp.einsum("ebi,be->bi", each(self.o, jnp.tanh(one(self.w, x))), gates)


class Embedding(nnx.Module):
    def __init__(self, params, _, *, attend: bool):
        w = params["w"]
        table = nnx.Embed(*w.shape, param_dtype=w.dtype, rngs=nnx.Rngs(0))
        self.embed, self.attends = filled(table, embedding=w), attend

    def __call__(self, x):
        h = self.embed(jnp.argmax(x, axis=1))
        return self.embed.attend(jnp.tanh(h)) if self.attends else h


class Convolution(nnx.Module):
    def __init__(self, params, _, *, shape, flat=True, transposed=False, **options):
        w = params["w"]
        *window, inputs, outputs = w.shape
        inputs *= options.get("feature_group_count", 1)
        conv = (nnx.ConvTranspose if transposed else nnx.Conv)(
            inputs,
            outputs,
            window,
            use_bias=False,
            param_dtype=w.dtype,
            rngs=nnx.Rngs(0),
            **options,
        )
        self.conv, self.shape, self.flat = filled(conv, kernel=w), shape, flat
        self.doubled = "kernel_dilation" in options

    def __call__(self, x):
        if self.doubled:  # as the construct does
            x = jnp.concatenate([x, -x, 2 * x, x**2], axis=1)
        y = self.conv(x.reshape(self.shape))
        return y.reshape(y.shape[0], -1) if self.flat else y


class Heads(nnx.Module):
    def __init__(self, params, _):
        w = params["w"]
        dense = nnx.LinearGeneral(
            6, w.shape[1:], use_bias=False, param_dtype=w.dtype, rngs=nnx.Rngs(0)
        )
        self.dense = filled(dense, kernel=w)

    def __call__(self, x):
        return self.dense(x)


class Normed(nnx.Module):
    def __init__(self, params, layer):
        self.w, dtype = layer(params["w"]), params["w"].dtype
        self.norm = nnx.BatchNorm(8, param_dtype=dtype, rngs=nnx.Rngs(0))
        # Flax keeps the statistics in float32; here they are compared to 1e-9.
        self.norm.mean = nnx.BatchStat(jnp.zeros(8, dtype))
        self.norm.var = nnx.BatchStat(jnp.ones(8, dtype))

    def __call__(self, x):
        return self.norm(self.w(x))

    def moved(self):
        return self.norm.mean[...], self.norm.var[...]


class Dropped(nnx.Module):
    def __init__(self, params, layer):
        self.w = layer(params["w"])
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=7))

    def __call__(self, x):
        return self.drop(self.w(x))

    def moved(self):
        return (self.drop.rngs.count[...],)


def _remat(layers, x):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def f(layer, x):
        return jnp.tanh(checkpoint_name(jnp.tanh(layer(x)), "hidden")) ** 2

    return nnx.remat(f, policy=policy)(layers["w"], x)


def _while(layers, x):
    return jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(layers["w"](s[1]))), (0, x)
    )[1]


def _cond(layers, x):
    w, v = layers["w"], layers["v"]
    return jax.lax.cond(x.sum() > 0, lambda: w(x), lambda: jnp.tanh(v(x))) + v(x)


def _constraint(layers, x):
    place = NamedSharding(constructs._mesh(), _COLUMNS)
    return jax.lax.with_sharding_constraint(layers["w"](x), place)


def _sharded(*, kernel, a, b, x, out, summed: bool):
    """A layer inside `shard_map`, each of its parameters split by a spec of its own."""

    def f(layers, given):
        graph, state = nnx.split(layers["w"])
        specs = {"kernel": kernel, "kernel_lora_a": a, "kernel_lora_b": b}
        split = jax.tree_util.tree_map_with_path(
            lambda path, _: specs.get(path[0].key, _WHOLE), state
        )

        def local(state, x):
            y = nnx.merge(graph, state)(x)
            return jax.lax.psum(y, "data") if summed else y

        mesh = constructs._mesh()
        return jax.shard_map(local, mesh=mesh, in_specs=(split, x), out_specs=out)(state, given)

    return f


_WHOLE, _ROWS, _COLUMNS = PartitionSpec(), PartitionSpec("data", None), PartitionSpec(None, "data")


def _after(name: str):
    """What a construct does to the product's result: its model with the identity as the kernel."""

    def f(layers, x):
        h = layers["w"](x)
        return constructs.ALL[name].apply({"w": jnp.eye(h.shape[-1], dtype=h.dtype)}, h)

    return f


FUNCTIONS = {
    "dense": lambda layers, x: layers["w"](x),
    "bfloat16": lambda layers, x: layers["w"](x),
    "jit_inside": lambda layers, x: jnp.tanh(nnx.jit(lambda layer, x: layer(x))(layers["w"], x)),
    "remat_policy_by_name": _remat,
    "while_loop": _while,
    "cond_branches": _cond,
    "vmap_inside": lambda layers, x: jax.vmap(layers["w"])(x),
    "grad_inside": lambda layers, x: jax.grad(
        lambda x: jnp.sum(jnp.tanh(layers["w"](x)) ** 2)
    )(x),
    "custom_vjp_beside": lambda layers, x: constructs._attend(*(layers[n](x) for n in "qkv")),
    "pallas_beside": _after("pallas_beside"),
    "shard_map_beside": _after("shard_map_beside"),
    "shard_map_around": _sharded(
        kernel=_COLUMNS, a=_WHOLE, b=_COLUMNS, x=_WHOLE, out=_COLUMNS, summed=False
    ),
    "shard_map_over_inputs": _sharded(
        kernel=_ROWS, a=_ROWS, b=_WHOLE, x=_COLUMNS, out=_WHOLE, summed=True
    ),
    "sharding_constraint": _constraint,
    "nnx_linear_stack": lambda layers, x: layers["second"](jnp.tanh(layers["first"](x))),
}  # fmt: skip


def _each(name):
    return lambda params, layer: Each(params, layer, FUNCTIONS[name])


def _with(kind, **options):
    return lambda params, layer: kind(params, layer, **options)


def _convolution(shape, **options):
    return _with(Convolution, shape=shape, **options), {"w": (("conv",), "kernel")}


# The cases whose model asks `layer` for its layers.
LAYERED = frozenset(FUNCTIONS) | {
    "scanned_layers", "scanned_with_remat", "nnx_scan", "nnx_scan_remat", "layers_by_index",
    "mixture_of_experts",
    "nnx_batch_norm", "nnx_dropout",
}  # fmt: skip

_LAYERS = {"w": (("layers",), "kernel")}
_TABLE = {"w": (("embed",), "embedding")}
MODELS: dict[str, tuple[Callable, dict[str, tuple[tuple[str, ...], str]]]] = {
    name: (_each(name), None) for name in FUNCTIONS
} | {
    "dense_general": (_with(Heads), {"w": (("dense",), "kernel")}),
    "scanned_layers": (_with(Scanned), _LAYERS),
    "scanned_with_remat": (_with(Scanned, remat=True), _LAYERS),
    "nnx_scan": (_with(Scanned), _LAYERS),
    "nnx_scan_remat": (_with(Scanned, remat=True), _LAYERS),
    "layers_by_index": (_with(ByIndex), _LAYERS),
    "mixture_of_experts": (_with(Experts), None),
    "lookup": (_with(Embedding, attend=False), _TABLE),
    "tied_embedding": (_with(Embedding, attend=True), _TABLE),
    "nnx_embed_attend": (_with(Embedding, attend=True), _TABLE),
    "nnx_batch_norm": (_with(Normed), None),
    "nnx_dropout": (_with(Dropped), None),
    "conv_1d": _convolution((5, 2, 3)),
    "conv_2d_strided_and_dilated": _convolution(
        (5, 2, 4, 3), strides=(2, 1), kernel_dilation=(1, 2)
    ),
    "conv_3d": _convolution((5, 1, 3, 2, 1)),
    "grouped_conv": _convolution((5, 3, 2), feature_group_count=2),
    "depthwise_conv": _convolution((1, 5, 6), feature_group_count=6),
    "transposed_conv": _convolution((5, 3, 2), transposed=True, strides=(2,), flat=False),
    "nnx_conv": _convolution((5, 2, 3), flat=False),
}


def make_model(name: str, params, layer=plain_layer):
    """The module of a case, and `{kernel: (path of its module, name of its parameter)}`."""
    make, paths = MODELS[name]
    return make(params, layer), paths or {kernel: ((kernel,), "kernel") for kernel in params}
