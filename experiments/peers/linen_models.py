"""The Linen cases as Linen modules. Parameters are `{"params": {layer: {"kernel": array}}}`."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from experiments.peers.cases import Case


class TwoLayers(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8, use_bias=False, param_dtype=self.dtype, name="first")(x)
        return nn.Dense(4, use_bias=False, param_dtype=self.dtype, name="second")(jnp.tanh(h))


class Layer(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(6, use_bias=False, param_dtype=self.dtype, name="w")(h)), None


class Scanned(nn.Module):
    dtype: str
    remat: bool

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            nn.remat(Layer) if self.remat else Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(self.dtype, name="layers")(x, None)[0]


class Whole(nn.Module):
    """A case's plain function with its kernels as this module's parameters."""

    case: Case
    dtype: str

    @nn.compact
    def __call__(self, x):
        def kernel(name, shape):
            return self.param(name, nn.initializers.normal(), shape, self.dtype)

        shapes = self.case.shapes.items()
        return self.case.apply({name: kernel(name, shape) for name, shape in shapes}, x)


LAYERED = frozenset({"linen_dense", "linen_scan", "scanned_layers", "scanned_with_remat"})


def make_model(case: Case, dtype: str):
    """`(module, {kernel: path of its parameter in "params"})`: layers where Linen has them."""
    if case.name == "linen_dense":
        return TwoLayers(dtype), {name: (name, "kernel") for name in case.shapes}
    if case.name in LAYERED:
        remat = case.name in ("linen_scan", "scanned_with_remat")
        return Scanned(dtype, remat), {"w": ("layers", "w", "kernel")}
    return Whole(case, dtype), {name: (name,) for name in case.shapes}
