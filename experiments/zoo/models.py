"""The models of the zoo, built as in the documentation of their libraries; small and random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optimistix
from flax import nnx
from jax.experimental.ode import odeint


@dataclasses.dataclass(frozen=True)
class Model:
    """A model `apply(params, x)` of a library; `targets` names what is adapted."""

    apply: Callable[[Any, Any], jax.Array]
    params: Any
    x: Any
    targets: str = ".*"

    def __post_init__(self):
        # Flax draws float32 parameters under x64, too.
        wide = jax.tree.map(_widened, self.params)
        object.__setattr__(self, "params", wide)


def _widened(leaf):
    is_float = eqx.is_inexact_array(leaf)
    return leaf.astype(jnp.float64) if is_float else leaf


def _normal(seed: int, *shape: int, scale: float = 0.4) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def _two_layers() -> dict[str, jax.Array]:
    return {"w1": _normal(1, 6, 8), "w2": _normal(2, 8, 6)}


def _field(params, y):
    return jnp.tanh(y @ params["w1"]) @ params["w2"]


def diffrax_default_adjoint() -> Model:
    def apply(params, y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, params: _field(params, y)),
            diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, args=params,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
        )  # fmt: skip
        return solution.ys[-1]

    return Model(apply, _two_layers(), _normal(3, 4, 6))


def diffrax_implicit_solver() -> Model:
    def apply(params, y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, params: _field(params, y)),
            diffrax.Kvaerno3(), 0.0, 0.5, 0.1, y0, args=params,
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
        )  # fmt: skip
        return solution.ys[-1]

    return Model(apply, _two_layers(), _normal(3, 6))


def optimistix_fixed_point() -> Model:
    def apply(params, x):
        solver = optimistix.FixedPointIteration(rtol=1e-12, atol=1e-12)

        def step(y, args):
            return x + 0.1 * _field(args, y)

        return optimistix.fixed_point(step, solver, x, args=params).value

    return Model(apply, _two_layers(), _normal(3, 4, 6))


def optimistix_root_find() -> Model:
    def apply(params, x):
        solver = optimistix.Newton(rtol=1e-12, atol=1e-12)

        def residual(y, args):
            return y - x - 0.1 * _field(args, y)

        return optimistix.root_find(residual, solver, x, args=params).value

    return Model(apply, _two_layers(), _normal(3, 6))


def jax_odeint() -> Model:
    def apply(params, y0):
        times = jnp.linspace(0.0, 1.0, 3)
        return odeint(lambda y, t, params: _field(params, y), y0, times, params)[-1]

    return Model(apply, _two_layers(), _normal(3, 4, 6))


class EquinoxLanguageModel(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(17, 8, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
        self.norm = eqx.nn.LayerNorm(8)
        self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=keys[2])
        self.head = eqx.nn.Linear(8, 17, key=keys[3])

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        causal = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        x = x + self.attention(x, x, x, mask=causal)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))
        return jax.vmap(self.head)(x)


def equinox_language_model() -> Model:
    ids = jax.random.randint(jax.random.key(3), (3, 5), 0, 17)
    model = EquinoxLanguageModel(jax.random.key(0))
    return Model(lambda model, ids: jax.vmap(model)(ids), model, ids)


def linen_optimized_lstm() -> Model:
    module = nn.RNN(nn.OptimizedLSTMCell(7, param_dtype=jnp.float64))
    x = _normal(3, 2, 4, 5)
    variables = module.init(jax.random.key(0), x)
    return Model(lambda variables, x: module.apply(variables, x), variables, x)


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 8, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(_normal(1, 1, 1, 8))
        self.positions = nnx.Param(_normal(2, 1, 5, 8))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(3)])
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images).reshape(images.shape[0], -1, 8)
        first = jnp.broadcast_to(self.cls[...], (images.shape[0], 1, 8))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x)[:, 0])


def nnx_vit() -> Model:
    graphdef, params = nnx.split(ViT(nnx.Rngs(0)), nnx.Param)

    def apply(params, x):
        return nnx.merge(graphdef, params)(x)

    return Model(apply, params, _normal(3, 2, 8, 8, 3))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for strides in (1, 2):
            y = nn.relu(nn.GroupNorm(num_groups=2)(x))
            y = nn.Conv(8, (3, 3), strides=strides)(y)
            y = nn.Conv(8, (3, 3))(nn.relu(nn.GroupNorm(num_groups=2)(y)))
            x = nn.Conv(8, (1, 1), strides=strides, use_bias=False)(x) + y
        return nn.Dense(4)(x.mean((1, 2)))


def linen_resnet() -> Model:
    module, x = ResNet(), _normal(3, 2, 8, 8, 3)
    variables = module.init(jax.random.key(0), x)
    return Model(lambda variables, x: module.apply(variables, x), variables, x)


def equinox_checkpointed_loop() -> Model:
    def apply(params, x):
        def step(y):
            return y + 0.1 * _field(params, y)

        return eqx.internal.while_loop(
            lambda y: True, step, x, max_steps=8, kind="checkpointed", checkpoints=3
        )

    return Model(apply, _two_layers(), _normal(3, 4, 6))


MODELS = {
    "diffrax: diffeqsolve, default adjoint": diffrax_default_adjoint,
    "diffrax: implicit solver (Kvaerno3)": diffrax_implicit_solver,
    "optimistix: fixed_point": optimistix_fixed_point,
    "optimistix: root_find": optimistix_root_find,
    "jax.experimental.ode: odeint": jax_odeint,
    "equinox: checkpointed loop": equinox_checkpointed_loop,
    "equinox: language model, vmapped embedding": equinox_language_model,
    "flax.linen: RNN of OptimizedLSTMCell": linen_optimized_lstm,
    "flax.nnx: ViT": nnx_vit,
    "flax.linen: ResNet": linen_resnet,
}
