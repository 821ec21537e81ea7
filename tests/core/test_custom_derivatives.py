"""Derivative rules of the user's own get under `lift` what plain JAX gives them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.core.adapted import largest_difference, random_like
from tests.core.constructs import ALL

SymbolicZero = jax.custom_derivatives.SymbolicZero


@jax.custom_vjp
def vjp_with_symbolic_zeros(w, x, n):
    return (x @ w) * n, jnp.sum(x)


def _forward(w, x, n):
    assert w.perturbed and not n.perturbed  # as in plain JAX
    y = vjp_with_symbolic_zeros(w.value, x.value, n.value)
    return y, (w.value, x.value, n.value)


def _backward(saved, cotangents):
    (w, x, n), (g, unused) = saved, cotangents
    assert isinstance(unused, SymbolicZero)
    return x.T @ g * n, g * n @ w.T, None


vjp_with_symbolic_zeros.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_jvp
def jvp_with_symbolic_zeros(w, x, n):
    return (x @ w) * n, jnp.sum(x)


def _jvp(primals, tangents):
    (w, x, n), (tw, tx, tn) = primals, tangents
    assert isinstance(tx, SymbolicZero) and isinstance(tn, SymbolicZero)
    y, total = jvp_with_symbolic_zeros(w, x, n)
    return (y, total), (x @ tw * n, SymbolicZero(jax.typeof(total).to_tangent_aval()))


jvp_with_symbolic_zeros.defjvp(_jvp, symbolic_zeros=True)


@jax.custom_vjp
def vjp_of_a_key(w, x, key):
    return (x @ w) * jax.random.uniform(key, (1, 4))


vjp_of_a_key.defvjp(
    lambda w, x, key: (vjp_of_a_key(w, x, key), (w, x, key)),
    lambda r, g: (
        r[1].T @ (g * jax.random.uniform(r[2], (1, 4))),
        (g * jax.random.uniform(r[2], (1, 4))) @ r[0].T,
        None,
    ),
)


@jax.custom_vjp
def vjp_that_branches(w, x, n):
    return (x @ w) * n


def _forward_with_flags(w, x, n):
    saved = w.value, x.value, n.value, w.perturbed, n.perturbed, 2
    return vjp_that_branches(w.value, x.value, n.value), saved


def _backward_that_branches(saved, g):
    w, x, n, w_perturbed, n_perturbed, twice = saved
    assert w_perturbed and not n_perturbed and range(twice)  # Python's, as in plain JAX
    return x.T @ g * n, g * n @ w.T, None


vjp_that_branches.defvjp(_forward_with_flags, _backward_that_branches, symbolic_zeros=True)

RULES = {
    "a backward rule that branches": lambda p, x: vjp_that_branches(p["w"], x, 3),
    "a custom_vjp with a constant": ALL["custom_vjp_with_constants"].apply,
    "a custom_vjp with symbolic zeros": lambda p, x: vjp_with_symbolic_zeros(p["w"], x, 3)[0],
    "a custom_jvp with symbolic zeros": lambda p, x: jvp_with_symbolic_zeros(p["w"], x, 3)[0],
    "a custom_vjp of a key": lambda p, x: vjp_of_a_key(p["w"], x, jax.random.key(7)),
}


@pytest.mark.parametrize("name", RULES)
def test_gradients_through_a_rule_equal_those_through_merge(name):
    apply = RULES[name]
    params = random_like({"w": jnp.zeros((6, 4))}, 1)
    x = random_like(jnp.zeros((5, 6)), 2)
    method = lj.LoRA(targets="w", rank=2, alpha=3.0)
    trainable, frozen = method.init(jax.random.key(0), params)
    trainable = random_like(trainable, 3)

    def lifted(t):
        return jnp.sum(jnp.sin(lj.lift(apply, strict=True)(method.bind(t, frozen), x)))

    def merged(t):
        return jnp.sum(jnp.sin(apply(method.merge(t, frozen), x)))

    got, expected = (jax.jit(jax.value_and_grad(f))(trainable) for f in (lifted, merged))
    assert largest_difference(got, expected) < 1e-5


def jvp_over_a_traced_array(p, x):
    gates = jnp.cos(x[:, :4])

    @jax.custom_jvp
    def f(w):
        return (x @ w) * gates

    f.defjvp(lambda primals, tangents: (f(*primals), 2 * (x @ tangents[0]) * gates))
    return f(p["w"])


def vjp_over_a_traced_array(p, x):
    gates = jnp.cos(x[:, :4])

    @jax.custom_vjp
    def f(w):
        return (x @ w) * gates

    f.defvjp(lambda w: (jnp.tanh(x @ w) * gates, gates), lambda gates, g: (x.T @ (g * gates),))
    return f(p["w"])


def loss_of(apply, run):
    method = lj.LoRA(targets="w", rank=2, alpha=3.0)
    trainable, frozen = method.init(jax.random.key(0), random_like({"w": jnp.zeros((6, 4))}, 1))
    x = random_like(jnp.zeros((5, 6)), 2)
    return lambda t: jnp.sum(jnp.sin(run(apply, method, t, frozen, x))), random_like(trainable, 3)


def _lifted(apply, method, t, frozen, x):
    return lj.lift(apply, strict=True)(method.bind(t, frozen), x)


def _merged(apply, method, t, frozen, x):
    return apply(method.merge(t, frozen), x)


def jvp_that_alone_uses_a_traced_array(p, x):
    gates = jnp.cos(x[:, :4])
    f = jax.custom_jvp(lambda w: x @ w)
    f.defjvp(lambda primals, tangents: (f(*primals), (x @ tangents[0]) * gates))
    return f(p["w"])


def vjp_that_alone_uses_a_traced_array(p, x):
    gates = jnp.sin(x[:, 2:])
    f = jax.custom_vjp(lambda w: x @ w)
    f.defvjp(lambda w: (x @ w, None), lambda _, g: (x.T @ (g * gates),))
    return f(p["w"])


OVER_AN_ARRAY = [
    jvp_over_a_traced_array,
    vjp_over_a_traced_array,
    jvp_that_alone_uses_a_traced_array,
    vjp_that_alone_uses_a_traced_array,
]


@pytest.mark.parametrize("wrap", [jax.jit, lambda fun: fun], ids=["jit", "eager"])
@pytest.mark.parametrize("apply", OVER_AN_ARRAY)
def test_a_rule_may_close_over_an_array_that_the_model_computes(apply, wrap):
    got, expected = (
        wrap(jax.value_and_grad(loss))(trainable)
        for loss, trainable in (loss_of(apply, _lifted), loss_of(apply, _merged))
    )
    assert largest_difference(got, expected) < 1e-5


def depends_on(path):
    def apply(p, x):
        gates = jnp.cos(jax.lax.stop_gradient(x @ p[path]))
        f = jax.custom_vjp(lambda w: x @ w)
        f.defvjp(lambda w: (x @ w, None), lambda _, g: (x.T @ (g * gates),))
        return f(p["w"])

    return apply


@pytest.mark.parametrize("path, dropout", [("w", 0.0), ("v", 0.5)])
def test_an_array_that_a_rule_cannot_have_is_one_line_that_names_the_way(path, dropout):
    params = random_like({"w": jnp.zeros((6, 4)), "v": jnp.zeros((6, 4))}, 1)
    rules = [lj.Rule("w", rank=2, alpha=1), lj.Rule("v", rank=2, alpha=1, dropout=dropout)]
    method = lj.LoRA(rules=rules)
    trainable, frozen = method.init(jax.random.key(0), params)
    x = random_like(jnp.zeros((5, 6)), 2)

    def loss(t):
        bound = method.bind(t, frozen, key=jax.random.key(1) if dropout else None)
        return jnp.sum(lj.lift(depends_on(path))(bound, x))

    with pytest.raises(lj.RequestError, match="make that array an argument"):
        jax.grad(loss)(trainable)
