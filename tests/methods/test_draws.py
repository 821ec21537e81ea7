"""What is drawn again on loading is the same under every global PRNG setting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.draws import key_from_seed
from lora_jax.core.errors import RequestError
from lora_jax.methods.intrinsic import IntrinsicDimension
from lora_jax.methods.uni_lora import UniLoRA
from lora_jax.train.adapted import _check_drawn

PARAMS = {"w": np.arange(64, dtype=np.float32).reshape(8, 8) / 64}
REDRAWN = {
    "vera": lj.VeRA(targets="w", rank=2),
    "fastfood": IntrinsicDimension(dim=5),
    "grouped": IntrinsicDimension(dim=5, projection="grouped"),
    "dense": IntrinsicDimension(dim=5, projection="dense"),
    "uni_lora": UniLoRA(targets="w", rank=2, dim=5, start="lora"),
}
OTHER = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_enable_x64": True,
}


@pytest.fixture(params=OTHER)
def other_setting(request):
    """A function that turns the setting on; it is undone after the test."""
    before = getattr(jax.config, request.param)
    yield lambda: jax.config.update(request.param, OTHER[request.param])
    jax.config.update(request.param, before)


def trained(method):
    trainable, _ = method.init(key_from_seed(1), PARAMS)
    return {
        name: {
            part: np.asarray(x if part in ("key", "layout") else x + np.float32(0.5))
            for part, x in entry.items()
        }
        for name, entry in trainable.items()
    }


@functools.cache
def in_the_default_settings(name):
    """A function that gives the bits of what a method merges, and what it gave; once for all."""
    method = REDRAWN[name]
    trainable = trained(method)

    @jax.jit
    def squares(trainable):
        return jnp.sum(method.merge(trainable, PARAMS)["w"] ** 2)

    def merged():
        found = method.merge(trainable, PARAMS)["w"], squares(trainable)
        return [np.asarray(x).tobytes() for x in found] + [method.drawn(trainable)]

    return merged, merged()


@pytest.mark.parametrize("name", REDRAWN)
def test_the_same_adapter_merges_to_the_same_weights_under_any_setting(name, other_setting):
    merged, expected = in_the_default_settings(name)
    other_setting()
    assert merged() == expected


def test_keys_are_those_of_jax_in_its_default_settings():
    for seed in (0, 7, 2**32 + 5, 2**62, -1):
        expected = jax.random.key(seed, impl="threefry2x32")
        assert np.array_equal(
            jax.random.key_data(key_from_seed(seed)), jax.random.key_data(expected)
        )


@pytest.mark.parametrize("name", REDRAWN)
def test_an_adapter_trained_with_other_random_numbers_is_refused(name):
    method = REDRAWN[name]
    here = method.drawn(trained(method))
    _check_drawn(here, here, "adapter")
    _check_drawn(here, {}, "adapter")  # written before the sample was kept
    there = {key: [-x for x in row] for key, row in here.items()}
    with pytest.raises(RequestError, match="other random numbers"):
        _check_drawn(here, there, "adapter")
