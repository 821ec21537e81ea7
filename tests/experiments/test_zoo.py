"""The judge of the zoo: right models have a difference of rounding, wrong ones a large one."""

import types

import jax
import jax.numpy as jnp

from experiments.zoo.__main__ import judge


def model(apply):
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    return types.SimpleNamespace(apply=apply, params=params, x=jnp.ones((2, 4)), targets=".*")


def test_a_right_model_differs_by_rounding():
    row = judge(model(lambda params, x: jnp.tanh(x @ params["w"])))
    assert row["adapters"] == 1 and row["materialised"] == 0
    assert row["outputs"] < 1e-5 and row["gradients"] < 1e-5


def test_a_model_that_counts_its_calls_is_found_wrong():
    calls = []

    def apply(params, x):
        calls.append(None)
        return x @ params["w"] + len(calls)

    assert judge(model(apply))["outputs"] > 0.1


def test_a_materialised_parameter_is_counted():
    row = judge(model(lambda params, x: (x @ params["w"]) @ jnp.tanh(params["w"]).T))
    assert row["materialised"] == 1 and row["gradients"] < 1e-5
