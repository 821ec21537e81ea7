"""LoRA+: `b` steps at `ratio` times the rate of `a`; parameters trained whole at the base rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from tests.methods.variants import AXES, TARGETS, X, apply, params_of, trained


def gradients(method, trainable, frozen):
    loss = lambda t: jnp.mean(lj.lift(apply)(method.bind(t, frozen), X) ** 2)  # noqa: E731
    return jax.grad(loss)(trainable)


def test_a_step_is_two_parameter_groups_as_torch_has_them():
    """AdamW's first step by hand: -rate · (g / (|g| + eps) + decay · p), b's rate 8 times a's."""
    method = lj.LoRAPlus(targets=TARGETS, rank=2, ratio=8.0, axes=AXES, train="head")
    _, trainable, frozen = trained(method)
    grads = gradients(method, trainable, frozen)
    tx = method.optimizer(optax.adamw(1e-3, eps=1e-8, weight_decay=0.1))
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    for name, entry in trainable.items():
        for part, p in entry.items():
            g = np.asarray(grads[name][part], np.float64)
            rate = 8e-3 if part == "b" else 1e-3
            expected = -rate * (g / (np.abs(g) + 1e-8) + 0.1 * np.asarray(p, np.float64))
            np.testing.assert_allclose(updates[name][part], expected, rtol=2e-3, atol=1e-7)


def test_it_computes_what_lora_computes():
    ours = lj.LoRAPlus(targets=TARGETS, rank=2, alpha=3.0, axes=AXES)
    _, trainable, frozen = trained(ours)
    lora = lj.LoRA(targets=TARGETS, rank=2, alpha=3.0, axes=AXES)
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.merge(trainable, frozen),
        lora.merge(trainable, frozen),
    )


def test_cells_of_one_ratio_share_a_program_and_others_do_not():
    cells = [
        {"method": "lora_plus", "targets": "plain", "rank": 2, "lr": lr, "ratio": ratio}
        for lr, ratio in ((1e-3, 4.0), (1e-2, 4.0), (1e-3, 16.0))
    ]
    of = lambda p, x: jnp.mean(apply(p, x) ** 2)  # noqa: E731
    found = lj.sweep(of, params_of(), [X], cells, num_steps=1, progress=False)
    assert [row.pack for row in found] == [1, 1, 2]


def test_a_mask_that_would_lose_the_ratio_is_refused():
    method = lj.LoRAPlus(targets="plain", rank=2, ratio=8.0, axes=AXES)
    _, trainable, frozen = trained(method)
    with pytest.raises(lj.RequestError, match=r"b 8 times.*use method.optimizer"):
        method.mask(method.bind(trainable, frozen))
    rows = lj.LoRA(targets="plain", rank=2, rows={"table": (1,)}, axes=AXES)
    _, trainable, frozen = trained(rows)
    with pytest.raises(lj.RequestError, match=r"rows=.* no leaf of the bound tree trains them"):
        rows.mask(rows.bind(trainable, frozen))


def test_the_optimizer_passes_on_what_a_transformation_asks_for():
    method = lj.LoRAPlus(targets="plain", rank=2, ratio=8.0, axes=AXES)
    _, trainable, _ = trained(method)
    by_loss = optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda updates, state, params=None, *, value, **extra: (
            jax.tree.map(lambda u: u * value, updates), state,
        ),
    )  # fmt: skip
    tx = method.optimizer(by_loss)
    updates, _ = tx.update(trainable, tx.init(trainable), trainable, value=2.0)
    np.testing.assert_allclose(updates["plain"]["a"], 2.0 * trainable["plain"]["a"])
    np.testing.assert_allclose(updates["plain"]["b"], 16.0 * trainable["plain"]["b"])


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_no_positive_number_is_refused(ratio):
    with pytest.raises(lj.RequestError, match="ratio is"):
        lj.LoRAPlus(targets="plain", ratio=ratio)
