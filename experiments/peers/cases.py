"""The constructs of the table, each with its model in plain JAX, which is what the oracle applies.

Most come from `tests/core/constructs.py`; the rest are what frameworks add (NNX, Linen, Equinox),
written out here in plain JAX, independently of the framework's own layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from tests.core.constructs import ALL

RANK, ALPHA = 2, 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    `apply(params, x)` takes `x (5, 6)`; `params` are `{kernel: array}` of `shapes`. `roles` says of
    each axis of a kernel whether it is contracted ("i"), kept ("o") or stacked ("s"): the usual
    reading, which a tool may replace by its own. `slices` are `(axis, start, stop)`, adapted alone.
    """

    name: str
    title: str
    group: str
    shapes: Mapping[str, tuple[int, ...]]
    apply: Callable
    roles: Mapping[str, str]
    slices: tuple[tuple[int, int, int], ...] = ()
    framework: str = "plain"
    dtype: str = "float64"

    @property
    def forward_mode(self) -> bool:
        """`while_loop` has no backward pass in JAX; it is judged by its forward derivative."""
        return self.name == "while_loop"


# Name in tests/core/constructs.py: what the table calls it, and the roles of its kernels' axes.
PLAIN = {
    "products": {
        "dense": ("x @ W", "io"),
        "kernel_on_the_left": ("W @ x", "oi"),
        "dense_general": ("einsum with two output axes", "ioo"),
        "transposed_reshaped_cast": ("transposed, reshaped and cast before the product", "io"),
        "sliced_and_split": ("kernel split, and strided, before its products", "io"),
        "fused_slice": ("adapters on the q and v slices of a fused qkv kernel", "io"),
        "kernels_fused_inside": ("two kernels concatenated inside the model", "io"),
        "kernels_stacked_inside": ("two kernels stacked inside the model", "io"),
        "padded_kernel": ("kernel padded, rows spread too", "io"),
        "put_kernel": ("`device_put` of the kernel", "io"),
        "complex_kernel": ("two kernels as one complex kernel", "io"),
        "weight_norm": ("kernel normalised before the product", "io"),
        "tied_both_ways": ("one kernel as W and as Wᵀ", "io"),
    },
    "embeddings": {
        "lookup": ("lookup of rows", "io"),
        "lookup_of_one_row_vmapped": ("lookup of one row, under `vmap`", "io"),
        "tied_embedding": ("lookup, and the logits from the same table", "io"),
    },
    "convolutions": {
        "conv_1d": ("1-D", "iio"),
        "conv_2d_strided_and_dilated": ("2-D, strided and dilated", "iiio"),
        "conv_3d": ("3-D", "iiiio"),
        "grouped_conv": ("grouped", "iio"),
        "depthwise_conv": ("depthwise", "iio"),
        "transposed_conv": ("transposed", "iio"),
        "conv_vmapped_over_kernels": ("`vmap` over kernels and inputs", "siio"),
        "depthwise_conv_of_keras": ("depthwise as Keras has it", "iso"),
    },
    "experts": {
        "mixture_of_experts": ("mixture of experts, batched einsum", "sio"),
        "ragged_experts": ("experts by `ragged_dot`", "sio"),
    },
    "control flow": {
        "scanned_layers": ("`scan` over stacked layers", "sio"),
        "scanned_with_remat": ("`scan` over stacked layers, each under `checkpoint`", "sio"),
        "layers_by_index": ("`fori_loop`, stacked layers by index", "sio"),
        "while_loop": ("`while_loop`", "io"),
        "cond_branches": ("branches of `cond`", "io"),
        "kernel_in_a_carry": ("kernel changed in a loop's carry", "io"),
    },
    "transformations inside the model": {
        "remat_policy_by_name": ("`checkpoint` with a policy by name", "io"),
        "vmap_inside": ("`vmap`", "io"),
        "grad_inside": ("`grad`", "io"),
        "custom_vjp_beside": ("`custom_vjp` on activations", "io"),
        "custom_vjp_around": ("`custom_vjp` that takes the kernel", "io"),
        "custom_jvp_around": ("`custom_jvp` that takes the kernel", "io"),
        "pallas_beside": ("Pallas kernel on activations", "io"),
        "pallas_around": ("Pallas kernel that takes the weight", "io"),
        "shard_map_beside": ("`shard_map` on activations", "io"),
        "shard_map_around": ("`shard_map`, kernel split over outputs", "io"),
        "shard_map_over_inputs": ("`shard_map`, kernel split over inputs", "io"),
        "sharding_constraint": ("sharding constraint on the kernel", "io"),
        "custom_vjp_with_constants": ("`custom_vjp` that takes the kernel and a constant", "io"),
        "custom_vjp_with_symbolic_zeros": ("`custom_vjp` with symbolic zeros", "io"),
        "custom_jvp_with_symbolic_zeros": ("`custom_jvp` with symbolic zeros", "io"),
        "custom_jvp_over_a_traced_array": ("`custom_jvp` that closes over a traced array", "io"),
        "explicit_sharding": ("explicit sharding, `auto_axes`", "io"),
    },
}


def _from_tests(name: str, title: str, roles: str, group: str) -> Case:
    taken = ALL[name]
    every = dict.fromkeys(taken.shapes, roles)
    return Case(name, title, group, taken.shapes, taken.apply, every, tuple(taken.slices))


def jit_inside(p, x):
    return jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x)


def two_layers(p, x):
    return jnp.tanh(x @ p["first"]) @ p["second"]


def three_layers(p, x):
    for n in range(3):
        x = jnp.tanh(x @ p["w"][n])
    return x


def embed_and_attend(p, x):
    return jnp.tanh(p["w"][jnp.argmax(x, axis=1)]) @ p["w"].T


def convolution(p, x):
    """Three taps over width 2, padded with one zero on either side: no library's convolution."""
    x = jnp.pad(x.reshape(5, 2, 3), ((0, 0), (1, 1), (0, 0)))
    taps = jnp.stack([x[:, n : n + 2] for n in range(3)])
    return jnp.einsum("tbwi,tio->bwo", taps, p["w"])


def batch_norm(p, x):
    """`(y, running mean, running variance)` after one training step (Flax's defaults).

    As there, no gradient flows into the running statistics.
    """
    h = x @ p["w"]
    mean = h.mean(axis=0)
    variance = (h**2).mean(axis=0) - mean**2
    y = (h - mean[None]) / jnp.sqrt(variance[None] + 1e-5)
    mean, variance = jax.lax.stop_gradient((mean, variance))
    return y, 0.01 * mean, 0.99 + 0.01 * variance


def dropped(p, x):
    """`(y, draws so far)`: the mask is the first that `nnx.Dropout` draws with this key."""
    from flax import nnx

    h = x @ p["w"]
    mask = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=7))(jnp.ones(h.shape, h.dtype))
    return h * mask, jnp.uint32(1)


def mlp(p, x):
    return jnp.tanh(x @ p["first"].T) @ p["second"].T


STACK = {"first": (6, 8), "second": (8, 4)}
FRAMEWORKS = (
    ("nnx_linear_stack", "NNX: two `nnx.Linear`", STACK, two_layers, "io", "nnx"),
    ("nnx_scan", "NNX: `nnx.scan` over layers", {"w": (3, 6, 6)}, three_layers, "sio", "nnx"),
    ("nnx_conv", "NNX: `nnx.Conv`", {"w": (3, 3, 4)}, convolution, "iio", "nnx"),
    (
        "nnx_scan_remat", "NNX: `nnx.scan` over `nnx.remat` layers", {"w": (3, 6, 6)},
        three_layers, "sio", "nnx",
    ),
    (
        "nnx_embed_attend", "NNX: `nnx.Embed` and its `attend`", {"w": (6, 4)},
        embed_and_attend, "io", "nnx",
    ),
    (
        "nnx_batch_norm", "NNX: `BatchNorm`, its statistics updated", {"w": (6, 8)},
        batch_norm, "io", "nnx",
    ),
    ("nnx_dropout", "NNX: `Dropout`, its key advanced", {"w": (6, 8)}, dropped, "io", "nnx"),
    ("linen_dense", "Linen: two `nn.Dense`", STACK, two_layers, "io", "linen"),
    (
        "linen_scan", "Linen: `nn.scan` over `nn.remat` layers", {"w": (3, 6, 6)},
        three_layers, "sio", "linen",
    ),
    (
        "equinox_mlp", "Equinox: `eqx.nn.MLP`", {"first": (8, 6), "second": (6, 8)},
        mlp, "oi", "equinox",
    ),
)  # fmt: skip


def _cases() -> dict[str, Case]:
    cases = [
        _from_tests(name, title, roles, group)
        for group, names in PLAIN.items()
        for name, (title, roles) in names.items()
    ]
    inside = "transformations inside the model"
    at = next(n for n, case in enumerate(cases) if case.name == "vmap_inside")
    cases.insert(
        at, Case("jit_inside", "`jit`", inside, {"w": (6, 4)}, jit_inside, {"w": "io"})
    )  # constructs.py's own `inner_jit` also ties the kernel, which is another row here
    cases += [
        Case(name, title, "frameworks", shapes, apply, dict.fromkeys(shapes, roles), (), framework)
        for name, title, shapes, apply, roles, framework in FRAMEWORKS
    ]
    cases.append(
        dataclasses.replace(
            cases[0], name="bfloat16", title="bfloat16 kernel and activations",
            group="number formats", dtype="bfloat16",
        )
    )  # fmt: skip
    return {case.name: case for case in cases}


CASES = _cases()
