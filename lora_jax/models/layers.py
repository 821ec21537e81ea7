"""The pieces every family is made of: products, norms and tables, in Flax NNX.

Kernels are (in, out). The stream keeps the dtype of the embeddings; norms are computed in float32
at least. Attention has a file of its own, `attention.py`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.core.dtypes import float32_or_wider, promoted


class Linear(nnx.Module):
    """y = x @ kernel + bias; kernel (in, out) drawn from N(0, std^2), bias zero or left out."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float,
        rngs: nnx.Rngs,
        use_bias: bool = True,
    ):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...])
        if self.bias is None:
            return y
        # A bias trained in float32 must not widen a bfloat16 stream.
        return y + lax.broadcast_to_rank(self.bias[...].astype(y.dtype), y.ndim)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x (…, in) @ kernel (in, out)`.

    On CPU the rows are one axis: XLA's gradient of the kernel is up to 1.5 times faster so. Other
    backends choose layouts themselves, and a flattened batch could cost them a reshard.
    """
    dtype = promoted(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if x.ndim == 2 or jax.default_backend() != "cpu":
        return x @ kernel
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Embedding(nnx.Module):
    """A table (num_rows, features) read by row; an index past its end gives NaN, no wrong row."""

    def __init__(self, num_rows: int, features: int, *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (num_rows, features)))

    def __call__(self, indices: jax.Array) -> jax.Array:
        return self.embedding[...].at[indices].get(mode="fill", fill_value=jnp.nan)

    def attend(self, h: jax.Array) -> jax.Array:
        """Scores of every row, h (…, features) -> (…, num_rows): the head of a tied model."""
        return h @ self.embedding[...].T


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32 or wider."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        centred = wide - wide.mean(-1, keepdims=True)
        # Two passes: E[x^2] - E[x]^2 loses the digits the parity with transformers needs.
        variance = (centred * centred).mean(-1, keepdims=True)
        y = centred * lax.rsqrt(variance + self.eps)
        scale, bias = (
            lax.broadcast_to_rank(p[...].astype(y.dtype), y.ndim) for p in (self.scale, self.bias)
        )
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 or wider.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4.
    """

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        y = wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.eps)
        # Rounded before the scale, as the released models were trained.
        scale = lax.broadcast_to_rank(self.scale[...], y.ndim)
        dtype = promoted(x.dtype, scale.dtype)
        return (y.astype(x.dtype).astype(dtype) * scale.astype(dtype)).astype(x.dtype)


def fold_key(key: jax.Array | None, number) -> jax.Array | None:
    """A dropout key of one part of a model; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or as it is where that is wider."""
    return x.astype(float32_or_wider(x.dtype))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and rescales the rest; `key=None` changes nothing."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _exact_gelu(x: jax.Array) -> jax.Array:
    # erf, not the erfc of jax.nn.gelu: the same to float32 rounding and 2.5 times faster on CPU.
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _exact_gelu,
    "gelu_python": _exact_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
