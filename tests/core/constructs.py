"""Models for the tests of `lift`: one awkward construct each, in plain JAX.

`apply(params, x)` takes `x (5, 6)` and uses every kernel. The table of primitives in
`lora_jax/core/README.md` names each of them (`test_primitives.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ALL: dict[str, Construct] = {}


@dataclasses.dataclass(frozen=True)
class Construct:
    shapes: dict[str, tuple[int, ...]]
    apply: Callable
    low_rank: bool  # whether no kernel may be materialised
    slices: tuple[tuple[int, int, int], ...] = ()  # (axis, start, stop): adapters on these alone


def construct(low_rank: bool = True, slices=(), **shapes):
    def register(apply):
        ALL[apply.__name__] = Construct(shapes, apply, low_rank, tuple(slices))
        return apply

    return register


@construct(w=(6, 4))
def dense(p, x):
    return x @ p["w"]


@construct(w=(4, 6))
def kernel_on_the_left(p, x):
    return (p["w"] @ x.T).T


@construct(w=(6, 2, 3))
def dense_general(p, x):
    return jnp.einsum("bi,ihd->bhd", x, p["w"])


@construct(w=(2, 3, 4))
def two_input_axes(p, x):
    return jnp.einsum("bhd,hdo->bo", x.reshape(-1, 2, 3), p["w"])


@construct(w=(6, 8))
def transposed_reshaped_cast(p, x):
    w = p["w"].T.reshape(2, 4, 6).transpose(2, 0, 1).astype(x.dtype)
    return jnp.einsum("bi,ihd->bhd", x, w).reshape(-1, 8)


@construct(w=(6, 4))
def tied_both_ways(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


@construct(w=(3, 6, 6))
def scanned_layers(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


@construct(w=(3, 6, 6))
def scanned_with_remat(p, x):
    body = jax.checkpoint(
        lambda h, w: (jnp.tanh(h @ w), None), policy=jax.checkpoint_policies.dots_saveable
    )
    return jax.lax.scan(body, x, p["w"])[0]


@construct(w=(6, 6))
def shared_in_scan(p, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]


@construct(w=(3, 6, 6))
def layers_by_index(p, x):
    return jax.lax.fori_loop(0, 3, lambda n, h: jnp.tanh(h @ p["w"][n]), x)


@construct(w=(3, 6, 6))
def layers_in_python(p, x):
    for n in range(3):
        x = jnp.tanh(x @ p["w"][n])
    return x


@construct(w=(6, 6))
def while_loop(p, x):
    # Not reverse-differentiable: the tests differentiate it in forward mode only.
    state = (0, x)
    return jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), state
    )[1]


@construct(w=(6, 4), v=(6, 4))
def cond_branches(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: jnp.tanh(x @ p["v"])) + x @ p["v"]


@construct(w=(6, 12))
def remat_policy_by_name(p, x):
    from jax.ad_checkpoint import checkpoint_name

    policy = jax.checkpoint_policies.save_only_these_names("hidden")
    return jax.checkpoint(
        lambda w, x: jnp.tanh(checkpoint_name(jnp.tanh(x @ w), "hidden")) ** 2, policy=policy
    )(p["w"], x)


@construct(w=(6, 4))
def inner_jit(p, x):
    @functools.partial(jax.jit, static_argnames="times")
    def long(w, x, times):
        for _ in range(times):  # above the size that is inlined
            x = x + jnp.tanh(x @ w) @ w.T
        return x

    return long(p["w"], x, times=14)


@construct(w=(6, 4))
def vmap_inside(p, x):
    return jax.vmap(lambda row: p["w"].T @ row)(x)


@construct(w=(2, 6, 4))
def expert_batch(p, x):
    return jnp.einsum("bi,eio->beo", x, p["w"])


@construct(w=(6, 4))
def grad_inside(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2))(x)


@construct(w=(6, 4))
def jvp_inside(p, x):
    return jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (jnp.ones_like(x),))[1]


@jax.custom_vjp
def _attend(q, k, v):
    return jax.nn.softmax(q @ k.T, axis=-1) @ v


def _attend_forward(q, k, v):
    probs = jax.nn.softmax(q @ k.T, axis=-1)
    return probs @ v, (q, k, v, probs)


def _attend_backward(saved, g):
    q, k, v, probs = saved
    d_probs = g @ v.T
    d_scores = probs * (d_probs - jnp.sum(d_probs * probs, axis=-1, keepdims=True))
    return d_scores @ k, d_scores.T @ q, probs.T @ g


_attend.defvjp(_attend_forward, _attend_backward)


@construct(q=(6, 4), k=(6, 4), v=(6, 4))
def custom_vjp_beside(p, x):
    return _attend(x @ p["q"], x @ p["k"], x @ p["v"])


@jax.custom_vjp
def _linear_vjp(w, x):
    return jnp.tanh(x @ w)


def _linear_vjp_backward(saved, g):
    w, x, y = saved
    g = 2.0 * g * (1 - y**2)  # deliberately not the true gradient: the user's rule must be kept
    return x.T @ g, g @ w.T


_linear_vjp.defvjp(lambda w, x: (_linear_vjp(w, x), (w, x, jnp.tanh(x @ w))), _linear_vjp_backward)


@construct(w=(6, 4))
def custom_vjp_around(p, x):
    return _linear_vjp(p["w"], x)


@jax.custom_jvp
def _linear_jvp(w, x):
    return jnp.tanh(x @ w)


@_linear_jvp.defjvp
def _(primals, tangents):
    (w, x), (tw, tx) = primals, tangents
    y = jnp.tanh(x @ w)
    return y, 2.0 * (1 - y**2) * (tx @ w + x @ tw)  # deliberately doubled, as above


@construct(w=(6, 4))
def custom_jvp_around(p, x):
    return _linear_jvp(p["w"], x)


@construct(w=(6, 4))
def custom_jvp_beside(p, x):
    return jax.nn.silu(jax.nn.relu(x @ p["w"]))


@construct(w=(6, 8), o=(8, 6))
def dot_product_attention(p, x):
    heads = (x @ p["w"]).reshape(1, 5, 2, 4)
    return jax.nn.dot_product_attention(heads, heads, heads).reshape(5, 8) @ p["o"]


def _double_kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2.0


@construct(w=(6, 4))
def pallas_beside(p, x):
    h = x @ p["w"]
    double = pl.pallas_call(
        _double_kernel, out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype), interpret=True
    )

    @jax.custom_vjp
    def f(h):
        return double(h)

    f.defvjp(lambda h: (f(h), None), lambda _, g: (g * 2.0,))
    return f(h)


def _mesh():
    return Mesh(np.array(jax.devices()[:2]), ("data",))


@construct(w=(6, 4))
def shard_map_beside(p, x):
    h = jnp.tanh(x @ p["w"])
    spec = PartitionSpec(None, "data")
    return jax.shard_map(lambda h: h**2, mesh=_mesh(), in_specs=spec, out_specs=spec)(h)


@construct(w=(6, 4))
def shard_map_around(p, x):
    spec = PartitionSpec(None, "data")
    return jax.shard_map(
        lambda w, x: x @ w, mesh=_mesh(), in_specs=(spec, PartitionSpec()), out_specs=spec
    )(p["w"], x)


@construct(w=(6, 4))
def sharding_constraint(p, x):
    place = NamedSharding(_mesh(), PartitionSpec(None, "data"))
    w = jax.lax.with_sharding_constraint(p["w"], place)
    return jax.lax.with_sharding_constraint(x @ w, place)


@construct(w=(12, 4), v=(6, 4))
def sliced_and_split(p, x):
    first, second = jnp.split(p["w"], 2, axis=0)
    return x @ first + jnp.tanh(x @ second) + x[:, :3] @ p["v"][::2]


@construct(low_rank=False, w=(6, 4))
def weight_norm(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


@construct(w=(6, 4))
def shard_map_over_inputs(p, x):
    spec = PartitionSpec("data", None)
    return jax.shard_map(
        lambda w, x: jax.lax.psum(x @ w, "data"),
        mesh=_mesh(),
        in_specs=(spec, PartitionSpec(None, "data")),
        out_specs=PartitionSpec(),
    )(p["w"], x)


@construct(w=(3, 6, 6))
def shard_map_around_a_scan(p, x):
    def sharded(w, x):
        # Rows of the kernel are split, so each step sums over the shards.
        def step(h, w):
            mine = jax.lax.axis_index("data") * w.shape[0]
            part = jax.lax.dynamic_slice_in_dim(h, mine, w.shape[0], axis=1)
            return jnp.tanh(jax.lax.psum(part @ w, "data")), None

        return jax.lax.scan(step, x, w)[0]

    spec = PartitionSpec(None, "data", None)
    return jax.shard_map(
        sharded, mesh=_mesh(), in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec()
    )(p["w"], x)


def _ids(x):
    return jnp.argmax(x, axis=1)


@construct(w=(6, 4))
def lookup(p, x):
    return p["w"][_ids(x)]


@construct(w=(6, 2, 3))
def lookup_of_two_axes(p, x):
    return p["w"][jnp.stack([_ids(x), _ids(-x)], axis=1)]


@construct(w=(4, 6))
def lookup_of_columns(p, x):
    return jnp.take(p["w"], _ids(x), axis=1)


@construct(w=(6, 4))
def lookup_past_the_end(p, x):
    rows = p["w"].at[_ids(x) + 3].get(mode="fill", fill_value=7.0)
    return rows + jnp.take(p["w"], _ids(x), axis=0, mode="clip")


@construct(w=(6, 4))
def tied_embedding(p, x):
    return jnp.tanh(p["w"][_ids(x)]) @ p["w"].T


@construct(w=(3, 6, 4))
def lookup_in_scanned_tables(p, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(w[_ids(x)]), None), x[:, :4], p["w"])[0]


@construct(w=(6, 4), o=(4, 6))
def one_hot_embedding(p, x):
    return jax.nn.one_hot(_ids(x), 6, dtype=x.dtype) @ p["w"] @ p["o"]


def _conv(x, w, dims, **options):
    spatial = "DHW"[-(w.ndim - 2) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    options = {"window_strides": (1,) * (w.ndim - 2), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(
        x.reshape(dims), w, dimension_numbers=numbers, **options
    ).reshape(dims[0], -1)


@construct(w=(6, 4))
def lookup_of_one_row_vmapped(p, x):
    return (
        jax.vmap(lambda n: p["w"][n])(_ids(x))
        + jax.vmap(jax.vmap(lambda n: p["w"][n]))(_ids(x)[:, None])[:, 0]
    )


@construct(w=(4, 6))
def lookup_of_columns_vmapped(p, x):
    return jax.vmap(lambda n: jax.lax.dynamic_slice_in_dim(p["w"], n, 1, axis=1))(_ids(x))[..., 0]


@construct(w=(3, 6, 4))
def lookup_vmapped_over_tables(p, x):
    return jax.vmap(lambda w, n: w[n])(p["w"], jnp.stack([_ids(x), _ids(-x), _ids(x**2)]))


@construct(w=(6, 4))
def moved_kernel(p, x):
    start = jnp.cos(jnp.arange(24, dtype=x.dtype)).reshape(6, 4)
    return x @ (p["w"] + start) - jnp.tanh(x @ (start - p["w"])) + x @ (p["w"] - start)


@construct(w=(4, 3))
def padded_kernel(p, x):
    spread = jax.lax.pad(p["w"], jnp.ones((), x.dtype), ((-1, 0, 1), (0, 1, 0)))
    return x @ jnp.pad(p["w"], ((2, 0), (0, 1))) + jnp.tanh(x @ spread)


@construct(w=(6, 4))
def put_kernel(p, x):
    return x @ jax.device_put(p["w"])


@construct(w=(2, 2, 3, 4))
def conv_of_many_kernels(p, x):
    return jax.vmap(lambda w: _conv(x, w, (5, 2, 3)))(p["w"])


@construct(w=(2, 2, 3, 4))
def conv_vmapped_over_kernels(p, x):
    return jax.vmap(lambda x, w: _conv(x, w, (5, 2, 3)))(jnp.stack([x, -x]), p["w"])


@construct(w=(3, 6, 2))
def depthwise_conv_of_keras(p, x):
    return _conv(x, p["w"].reshape(3, 1, 12), (1, 5, 6), feature_group_count=6)


@construct(q=(6, 5), k=(6, 5))
def kernels_stacked_inside(p, x):
    return x @ jnp.stack([p["q"], p["k"]], axis=1).reshape(6, 10)


@construct(low_rank=False, w=(6, 4))
def masked_kernel(p, x):
    return x @ jnp.where(jnp.tri(6, 4) > 0, p["w"], 0)


@construct(q=(6, 5), k=(6, 5))
def complex_kernel(p, x):
    kernel = jax.lax.complex(p["q"], p["k"])
    return jnp.abs(x @ kernel) + jnp.real((x + 1j) @ (2j * kernel)) + x[:, :5]


@construct(w=(2, 3, 4))
def conv_1d(p, x):
    return _conv(x, p["w"], (5, 2, 3))


@construct(w=(2, 2, 3, 4))
def conv_2d_strided_and_dilated(p, x):
    x = jnp.concatenate([x, -x, 2 * x, x**2], axis=1)
    options = {"window_strides": (2, 1), "rhs_dilation": (1, 2), "padding": "SAME"}
    return _conv(x, p["w"], (5, 2, 4, 3), **options)


@construct(w=(1, 2, 2, 1, 4))
def conv_3d(p, x):
    return _conv(x, p["w"], (5, 1, 3, 2, 1))


@construct(w=(2, 1, 4))
def grouped_conv(p, x):
    return _conv(x, p["w"], (5, 3, 2), feature_group_count=2)


@construct(w=(3, 1, 6))
def depthwise_conv(p, x):
    return _conv(x, p["w"], (1, 5, 6), feature_group_count=6)


@construct(w=(4, 3, 2))
def conv_in_torch_order(p, x):
    return jax.lax.conv_general_dilated(
        x.reshape(5, 3, 2), p["w"], (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW")
    )


@construct(w=(3, 2, 4))
def transposed_conv(p, x):
    return jax.lax.conv_transpose(
        x.reshape(5, 3, 2), p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


@construct(w=(2, 3, 4))
def grad_of_conv_inside(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(_conv(x, p["w"], (5, 2, 3))) ** 2))(x)


@construct(w=(3, 6, 4))
def ragged_experts(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3], jnp.int32))


@construct(w=(2, 6, 4), o=(2, 4, 6))
def mixture_of_experts(p, x):
    gates = jax.nn.softmax(x[:, :2], axis=-1)
    hidden = jnp.tanh(jnp.einsum("bi,eio->ebo", x, p["w"]))
    return jnp.einsum("ebo,eoi,be->bi", hidden, p["o"], gates)


@construct(w=(6, 12), slices=[(-1, 0, 4), (-1, 8, 12)])
def fused_slice(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=1)
    return jax.nn.softmax(q @ k.T) @ v


@construct(w=(6, 3, 4), slices=[(-2, 0, 1), (-2, 2, 3)])
def fused_slice_of_an_axis(p, x):
    q, k, v = jnp.moveaxis(jnp.einsum("bi,ipo->bpo", x, p["w"]), 1, 0)
    return jax.nn.softmax(q @ k.T) @ v


@construct(w=(6, 4))
def scaled_kernel(p, x):
    return x @ (p["w"] * 0.5) - (x / 3.0) @ (-p["w"] / 2.0)


@construct(w=(6, 4))
def prepared_kernel(p, x):
    from jax.ad_checkpoint import checkpoint_name

    w = jax.lax.optimization_barrier(checkpoint_name(jnp.copy(p["w"]), "kernel"))
    return jnp.einsum("bi,sio->sbo", x, w[None])[0]


@construct(w=(6, 4))
def mapped_rows(p, x):
    return jax.lax.map(lambda row: row @ p["w"], x)


@construct(q=(6, 4), k=(6, 4))
def kernels_fused_inside(p, x):
    return x @ jnp.concatenate([p["q"], p["k"]], axis=1)


@construct(low_rank=False, w=(6, 4))
def pallas_around(p, x):
    def product(x_ref, w_ref, o_ref):
        o_ref[...] = x_ref[...] @ w_ref[...]

    @jax.custom_vjp
    def f(x, w):
        out = jax.ShapeDtypeStruct((5, 4), x.dtype)
        return pl.pallas_call(product, out_shape=out, interpret=True)(x, w)

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    return f(x, p["w"])


@construct(low_rank=False, w=(6, 6))
def kernel_in_a_carry(p, x):
    return jax.lax.fori_loop(0, 3, lambda n, s: (0.9 * s[0], jnp.tanh(s[1] @ s[0])), (p["w"], x))[1]


@construct(q=(3, 5), k=(3, 5))
def kernels_over_the_inputs(p, x):
    return x @ jnp.concatenate([p["q"], p["k"]], axis=0)


@construct(q=(6, 5), k=(6, 5))
def kernels_beside_a_plain_one(p, x):
    plain = jnp.cos(jnp.arange(12, dtype=x.dtype)).reshape(6, 2)
    return x @ jnp.concatenate([plain, p["q"], p["k"]], axis=1)


@construct(q=(6, 6), k=(6, 6))
def layers_stacked_inside(p, x):
    kernels = jnp.stack([p["q"], p["k"]])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, kernels)[0]


@construct(q=(6, 5), k=(6, 5))
def kernels_added(p, x):
    return x @ (p["q"] + p["k"]) - jnp.tanh(x @ (p["q"] - p["k"]))


@construct(w=(6, 4))
def scan_over_chunks_of_inputs(p, x):
    chunks = (jnp.moveaxis(x.reshape(-1, 2, 3), 1, 0), p["w"].reshape(2, 3, 4))
    start = jnp.zeros((x.shape[0], 4), x.dtype)
    return jax.lax.scan(lambda h, chunk: (h + chunk[0] @ chunk[1], None), start, chunks)[0]


@construct(w=(6, 4))
def scan_over_chunks_of_outputs(p, x):
    chunks = jnp.moveaxis(p["w"].reshape(6, 2, 2), 1, 0)
    return jnp.moveaxis(jax.lax.map(lambda w: x @ w, chunks), 0, 1).reshape(-1, 4)


@construct(w=(3, 6, 6))
def scan_over_chunks_in_scanned_layers(p, x):
    def layer(h, w):
        chunks = (jnp.moveaxis(h.reshape(-1, 2, 3), 1, 0), w.reshape(2, 3, 6))
        add = lambda s, chunk: (s + chunk[0] @ chunk[1], None)  # noqa: E731
        return jnp.tanh(jax.lax.scan(add, jnp.zeros_like(h), chunks)[0]), None

    return jax.lax.scan(layer, x, p["w"])[0]


@construct(w=(2, 2, 3, 4))
def grouped_conv_vmapped_over_kernels(p, x):
    one = lambda x, w: _conv(x, w, (5, 1, 6), feature_group_count=2)  # noqa: E731
    return jax.vmap(one)(jnp.stack([x, -x]), p["w"])


_SCALES = np.arange(1.0, 5.0)[None]


@jax.custom_vjp
def _scaled_vjp(w, x):
    return (x @ w) * _SCALES


_scaled_vjp.defvjp(
    lambda w, x: (_scaled_vjp(w, x), (w, x)),
    lambda saved, g: (saved[1].T @ (g * _SCALES), (g * _SCALES) @ saved[0].T),
)


@construct(w=(6, 4))
def custom_vjp_with_constants(p, x):
    return _scaled_vjp(p["w"], x)


@jax.custom_vjp
def _zeros_vjp(w, x, n):
    return (x @ w) * n, jnp.sum(x)


def _zeros_vjp_backward(saved, cotangents):
    (w, x, n), (g, _) = saved, cotangents
    return x.T @ g * n, g * n @ w.T, None


_zeros_vjp.defvjp(
    lambda w, x, n: (_zeros_vjp(w.value, x.value, n.value), (w.value, x.value, n.value)),
    _zeros_vjp_backward,
    symbolic_zeros=True,
)


@construct(w=(6, 4))
def custom_vjp_with_symbolic_zeros(p, x):
    return _zeros_vjp(p["w"], x, 3)[0]


@jax.custom_jvp
def _zeros_jvp(w, x):
    return x @ w, jnp.zeros(x.shape[0], int)


def _zeros_jvp_rule(primals, tangents):
    (w, x), outs = primals, _zeros_jvp(*primals)
    parts = [f(t) for f, t in zip((lambda t: x @ t, lambda t: t @ w), tangents, strict=True)
             if not isinstance(t, jax.custom_derivatives.SymbolicZero)]  # fmt: skip
    return outs, (sum(parts), jax.custom_derivatives.zero_from_primal(outs[1], symbolic_zeros=True))


_zeros_jvp.defjvp(_zeros_jvp_rule, symbolic_zeros=True)


@construct(w=(6, 4))
def custom_jvp_with_symbolic_zeros(p, x):
    return _zeros_jvp(p["w"], x)[0]


@construct(w=(6, 4))
def custom_jvp_over_a_traced_array(p, x):
    gates = jnp.cos(jnp.arange(4, dtype=x.dtype))[None]

    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ w) * gates

    @f.defjvp
    def _(primals, tangents):
        (w, x), (tw, tx) = primals, tangents
        y = jnp.tanh(x @ w)
        return y * gates, (1 - y**2) * gates * (tx @ w + x @ tw)

    return f(p["w"], x)


@construct(w=(6, 4))
def explicit_sharding(p, x):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    whole = NamedSharding(mesh, PartitionSpec(None, None))
    return jax.sharding.auto_axes(lambda w, x: x @ w, out_sharding=whole)(p["w"], x)
