"""Flax NNX: layers replaced by hand with `nnx.LoRALinear`, or `nnx.LoRA` added next to a product.

Both add x @ A @ B, with no scale. A case counts as expressible if such modules, made once and
called on activations, give it, the frozen kernel still used as the case has it; not if their
parameters would have to be taken apart inside the call, or their formula be written out again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from experiments.peers import nnx_models
from experiments.peers.cases import RANK, Case
from experiments.peers.judge import Adapted, NotExpressible, Way, update_of

NAME = "flax nnx.LoRA"
PACKAGES = ("flax", "jax")

_WINDOW = "it adds x @ A @ B, without a window; patches of x would have to be laid out by hand"
_TWICE = "the kernel is used in two ways; two `nnx.LoRA` would be two adapters"
_INSIDE = "the user's function takes the kernel, and the adapter would be added outside of it"
REASONS = {
    "tied_both_ways": _TWICE,
    "tied_embedding": _TWICE,
    "nnx_embed_attend": _TWICE,
    "weight_norm": "the norm is of W + ΔW, and it adds to the product",
    "kernel_in_a_carry": "the loop changes W + ΔW, and it adds to the product",
    "ragged_experts": "its product knows no group sizes",
    "custom_vjp_around": _INSIDE,
    "custom_jvp_around": _INSIDE,
    "custom_vjp_with_constants": _INSIDE,
    "custom_vjp_with_symbolic_zeros": _INSIDE,
    "custom_jvp_with_symbolic_zeros": _INSIDE,
    "custom_jvp_over_a_traced_array": _INSIDE,
    "linen_dense": "it is a layer of NNX",
    "linen_scan": "it is a layer of NNX",
    "equinox_mlp": "it is a layer of NNX",
} | dict.fromkeys(
    (
        "conv_1d", "conv_2d_strided_and_dilated", "conv_3d", "grouped_conv", "depthwise_conv",
        "transposed_conv", "nnx_conv", "conv_vmapped_over_kernels", "depthwise_conv_of_keras",
    ),
    _WINDOW,
)  # fmt: skip


def ways(case: Case):
    """One way: by hand."""
    if case.name in REASONS:
        yield Way("", lambda params, x: _refuse(case.name))
    elif case.name in BESIDE:
        yield Way("`nnx.LoRA` next to the product", lambda params, x: _beside(case, params), True)
    else:
        plain = case.framework == "plain"
        yield Way("`nnx.LoRALinear` layers", lambda params, x: _replaced(case, params), plain)


def _refuse(name):
    raise NotExpressible(REASONS[name])


def _lora_layer(w) -> nnx.LoRALinear:
    options = {"use_bias": False, "param_dtype": w.dtype, "lora_param_dtype": w.dtype}
    layer = nnx.LoRALinear(*w.shape, lora_rank=RANK, rngs=nnx.Rngs(0), **options)
    return nnx_models.filled(layer, kernel=w)


def _lora(inputs: int, outputs: int, dtype, base=None) -> nnx.LoRA:
    return nnx.LoRA(inputs, RANK, outputs, base_module=base, param_dtype=dtype, rngs=nnx.Rngs(0))


def _replaced(case, params) -> Adapted:
    model, where = nnx_models.make_model(case.name, params, _lora_layer)
    paths = {kernel: (*path, "lora") for kernel, (path, _) in where.items()}
    return _adapted(case, model, params, paths)


def _beside(case, params) -> Adapted:
    model = BESIDE[case.name](case, params)
    names = [path[:-1] for path in _factors_of(model) if path[-1] == "lora_a"]
    return _adapted(case, model, params, {path[-1]: path for path in names})


class Frozen(nnx.Module):
    """A case's own function of its kernels and x, as a module."""

    def __init__(self, case, params):
        self.f, self.names = case.apply, tuple(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, x):
        return self.f({name: getattr(self, name)[...] for name in self.names}, x)


class Based(nnx.Module):
    """`nnx.LoRA` with the case's own product as its base module, which keeps its results flat."""

    def __init__(self, case, params):
        (w,) = params.values()
        inputs = case.roles["w"].index("i")
        frozen = Frozen(case, params)
        self.shape = jax.eval_shape(frozen, jnp.ones((5, 6), w.dtype)).shape
        self.w = _lora(w.shape[inputs], w.size // w.shape[inputs], w.dtype, Flat(frozen))

    def __call__(self, x):
        return self.w(x).reshape(self.shape)


class Flat(nnx.Module):
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x).reshape(x.shape[0], -1)


class Lookup(nnx.Module):
    def __init__(self, case, params):
        w = params["w"]
        self.frozen, self.w = Frozen(case, params), _lora(*w.shape, w.dtype)

    def __call__(self, x):
        ids = jax.nn.one_hot(jnp.argmax(x, axis=1), 6, dtype=x.dtype)
        return self.frozen(x) + self.w(ids)


class LookupTwice(Lookup):
    """Two lookups of the same rows, each with its adapter's share."""

    def __call__(self, x):
        ids = jax.nn.one_hot(jnp.argmax(x, axis=1), 6, dtype=x.dtype)
        return self.frozen(x) + self.w(ids) + self.w(ids)


class Fused(nnx.Module):
    """Adapters on two of the three parts of a fused projection's result."""

    def __init__(self, case, params):
        w = params["w"]
        self.dense = nnx_models.plain_layer(w)
        for n, (_, start, stop) in enumerate(case.slices):
            setattr(self, f"w:{n}", _lora(6, stop - start, w.dtype))

    def __call__(self, x):
        q, k, v = jnp.split(self.dense(x), 3, axis=1)
        q, v = q + getattr(self, "w:0")(x), v + getattr(self, "w:1")(x)
        return jax.nn.softmax(q @ k.T) @ v


class Joined(nnx.Module):
    def __init__(self, case, params):
        self.frozen = Frozen(case, params)
        for name, value in params.items():
            setattr(self, name, _lora(*value.shape, value.dtype))

    def __call__(self, x):
        return self.frozen(x) + jnp.concatenate([self.q(x), self.k(x)], axis=1)


class Split(nnx.Module):
    """`x @ first + tanh(x @ second)` of one kernel's halves: each input is padded to the whole."""

    def __init__(self, case, params):
        self.frozen = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})
        for name, value in params.items():
            setattr(self, name, _lora(*value.shape, value.dtype))

    def __call__(self, x):
        first, second = jnp.split(self.frozen["w"][...], 2, axis=0)
        zero = jnp.zeros_like(x)
        strided = zero.at[:, ::2].set(x[:, :3])
        one = x @ first + self.w(jnp.concatenate([x, zero], axis=1))
        two = x @ second + self.w(jnp.concatenate([zero, x], axis=1))
        three = x[:, :3] @ self.frozen["v"][...][::2] + self.v(strided)
        return one + jnp.tanh(two) + three


class Padded(nnx.Module):
    """The kernel with rows before it, and with rows of ones between its own."""

    def __init__(self, case, params):
        w = params["w"]
        self.frozen, self.w = nnx.Dict({"w": nnx.Param(w)}), _lora(*w.shape, w.dtype)

    def __call__(self, x):
        w = self.frozen["w"][...]
        below = jnp.pad(w, ((2, 0), (0, 1)))
        spread = jax.lax.pad(w, jnp.ones((), x.dtype), ((-1, 0, 1), (0, 1, 0)))
        zero = jnp.zeros_like(x[:, :1])
        one, two = self.w(x[:, 2:]), self.w(jnp.concatenate([zero, x[:, 1::2]], axis=1))
        one, two = (jnp.pad(y, ((0, 0), (0, 1))) for y in (one, two))
        return x @ below + one + jnp.tanh(x @ spread + two)


class Complex(nnx.Module):
    """A real kernel and an imaginary one, each with its adapter."""

    def __init__(self, case, params):
        self.frozen = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})
        for name, value in params.items():
            setattr(self, name, _lora(*value.shape, value.dtype))

    def __call__(self, x):
        kernel = jax.lax.complex(self.frozen["q"][...], self.frozen["k"][...])
        one = jnp.ones_like(x[:1])  # the imaginary part of each input
        low = jax.lax.complex(self.q(x), self.k(x))
        low_turned = 2j * (low + 1j * jax.lax.complex(self.q(one), self.k(one)))
        turned = (x + 1j) @ (2j * kernel) + low_turned
        return jnp.abs(x @ kernel + low) + jnp.real(turned) + x[:, :5]


BESIDE = {
    "kernel_on_the_left": Based,
    "dense_general": Based,
    "transposed_reshaped_cast": Based,
    "pallas_around": Based,
    "shard_map_around": Based,
    "shard_map_over_inputs": Based,
    "sharding_constraint": Based,
    "explicit_sharding": Based,
    "put_kernel": Based,
    "lookup": Lookup,
    "lookup_of_one_row_vmapped": LookupTwice,
    "fused_slice": Fused,
    "kernels_fused_inside": Joined,
    "kernels_stacked_inside": Joined,
    "padded_kernel": Padded,
    "complex_kernel": Complex,
    "sliced_and_split": Split,
}


def _factors_of(model):
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))


def _adapted(case, model, params, paths) -> Adapted:
    """`paths` is `{name of an adapter: path of its nnx.LoRA}`."""
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    flat = _factors_of(model)
    places = {name: {c: (*path, f"lora_{c}") for c in "ab"} for name, path in paths.items()}
    factors = {name: {c: flat[at[c]] for c in "ab"} for name, at in places.items()}

    def run(factors, x):
        new = {places[name][c]: pair[c] for name, pair in factors.items() for c in "ab"}
        state, held = (jax.tree.map(lambda leaf: leaf, part) for part in (lora, rest))
        nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(flat | new))
        return nnx_models.outputs_of(nnx.merge(graph, state, held), x)

    def update(name, pair):
        kernel, _, part = name.partition(":")
        shape = params[kernel].shape
        if not part:
            return update_of(pair, case.roles[kernel], shape, 1.0)
        axis, start, stop = case.slices[int(part)]
        widths = [(0, 0)] * len(shape)
        widths[axis] = (start, shape[axis] - stop)
        return jnp.pad(pair["a"] @ pair["b"], widths)

    return Adapted(factors, run, update)
