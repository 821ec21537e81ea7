"""Layers computed again in the backward pass: the same numbers, less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import load_model
from lora_jax.models.remat import POLICIES
from lora_jax.models.shapes import abstract_model
from lora_jax.models.tiny import TINY_MODELS
from lora_jax.train.loss import make_loss

IDS = np.random.default_rng(0).integers(3, 60, (2, 12)).astype(np.int32)


def adapted(name, **options):
    model = load_model(name, **options)
    settings = {"axes": model.axes, "aliases": model.aliases}
    method = lj.LoRA(targets="q,v", rank=2, alpha=4, dropout=0.3, **settings)
    trainable, frozen = method.init(jax.random.key(0), model.params)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    trainable = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), trainable)
    return model, method, trainable, frozen


@pytest.mark.parametrize(
    "name, scan",
    [
        ("tiny-llama", True),
        *(
            pytest.param(f"tiny-{kind}", False, marks=pytest.mark.slow)
            for kind in ("bert", "roberta", "gpt2", "llama")
        ),
    ],
)
def test_every_policy_gives_the_same_gradients_dropout_included(name, scan):
    options = {"scan_layers": True} if scan else {}
    model, method, trainable, frozen = adapted(name, **options)
    key = jax.random.key(7)

    def loss(trainable, remat):
        bound = method.bind(trainable, frozen, key=key)
        out = model.apply(bound, IDS, dropout_key=jax.random.key(8), remat=remat)
        return jnp.sum(jnp.sin(out))

    gradients = {
        policy: jax.device_get(jax.jit(jax.grad(loss), static_argnums=1)(trainable, policy))
        for policy in ("", "nothing_saveable", "dots_saveable")
    }
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients[""]))
    for found in gradients.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, gradients[""]
        )
    assert largest > 0.01


def test_what_is_kept_shrinks_with_the_policy(optimised):
    """Temporaries of the compiled gradient of twelve scanned layers of 64 tokens."""
    config = dataclasses.replace(TINY_MODELS["tiny-llama"], num_hidden_layers=12, scan_layers=True)
    model = abstract_model(config)
    method = lj.LoRA(targets="all-linear", rank=2, alpha=4, axes=model.axes, aliases=model.aliases)
    trainable, frozen = jax.eval_shape(
        lambda params: method.init(jax.random.key(0), params), model.params
    )
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def temporaries(remat):
        def loss(trainable, frozen, ids):
            return jnp.sum(model.apply(method.bind(trainable, frozen), ids, remat=remat))

        compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporaries(name) for name in ("nothing_saveable", "dots_saveable", "")]
    assert sizes[0] < 0.7 * sizes[1] < sizes[1] < sizes[2]
    # Nothing but the states between layers: 12 of 4 x 64 x 32 numbers, and one layer at work.
    states = 12 * 4 * 64 * config.hidden_size * 4
    assert sizes[0] - states < (sizes[2] - states) / 2


def test_an_unknown_policy_is_named():
    with pytest.raises(lj.RequestError, match="remat='nothing' .* nearest: 'nothing_saveable'"):
        make_loss(lambda *_: None, lj.HeadOnly(), remat="nothing")
    assert all(hasattr(jax.checkpoint_policies, name) for name in POLICIES)
