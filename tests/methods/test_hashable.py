"""Methods as keys: equal methods hash equally, whatever lists and mappings they hold."""

import functools

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj


def made(kind):
    return kind(
        targets=["q", "v"], rank=2, rows={"e": [1]}, train=["h"], aliases={"q": "x/q", "v": "x/v"}
    )


@pytest.mark.parametrize("kind", [lj.LoRA, lj.DoRA, lj.VeRA, lj.PiSSA, lj.LoRAPlus])
def test_equal_methods_hash_equally(kind):
    assert made(kind) == made(kind) and hash(made(kind)) == hash(made(kind))


@pytest.mark.parametrize("kind", [lj.HeadOnly, lj.BitFit, lj.FullFineTuning])
def test_methods_without_adapters_hash_too(kind):
    assert hash(kind(train=["h"], rows={"e": [1]})) == hash(kind(train=["h"], rows={"e": [1]}))


def test_a_method_is_a_static_argument():
    @functools.partial(jax.jit, static_argnums=0)
    def start(method, key, params):
        return method.init(key, params)[0]

    method = lj.LoRA(targets="w", rank=2, rows={"e": [1]}, axes=None)
    params = {"w": jnp.ones((4, 4)), "e": jnp.ones((3, 4))}
    found = start(method, jax.random.key(0), params)
    assert found["w"]["a"].shape == (4, 2)
