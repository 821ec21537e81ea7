"""What every variant of LoRA must do, whatever its equation, inside the package or outside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.methods.registry import METHODS, method_of
from lora_jax.settings import OptimizerSettings
from lora_jax.train.optimizer import make_optimizer
from tests.core.adapted import largest_difference
from tests.methods.miss import MiSS
from tests.methods.outside import Bottleneck, Gained
from tests.methods.variants import AXES, TARGETS, X, apply, params_of, started, trained

RANKS = {"vera": 5, "lora_xs": 3}
VARIANTS = {
    name: method_of(
        name,
        {"targets": TARGETS, "rank": RANKS.get(name, 2), "alpha": 3.0, "train": "head"},
        axes=AXES,
        aliases=None,
    )
    for name, kind in METHODS.items()
    if issubclass(kind, lj.LoRA)
}
OUTSIDE = {"miss": MiSS, "gained": Gained, "bottleneck": Bottleneck}
ON = {"bottleneck": "plain|stacked|heads"}  # a nonlinearity between a and b has no lookups
VARIANTS |= {
    name: kind(targets=ON.get(name, TARGETS), rank=2, train="head", axes=AXES)
    for name, kind in OUTSIDE.items()
}
UNMERGED = [name for name, method in VARIANTS.items() if not method.MERGES]
# How far a fresh adapter is from the base: PiSSA subtracts its start to rounding, LoRA-XS's core
# starts at N(0, 1e-5).
START = {"pissa": 2e-6, "lora_xs": 1e-3}


def few_fast(*few, without=()):
    """Every variant as a test's parameter, those beside `few` among the slow tests."""
    return [
        name if name in few else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
        if name not in without
    ]


def loss_of(method, frozen):
    return lambda trainable: jnp.mean(lj.lift(apply)(method.bind(trainable, frozen), X) ** 2)


# DoRA's ‖W + BA‖ has the bits of its start only where XLA compiles both as users do: it is slow.
@pytest.mark.parametrize("name", few_fast("lora", "pissa", "lora_xs"))
def test_a_fresh_adapter_is_the_base(name):
    method = VARIANTS[name]
    params, trainable, frozen = started(method)
    found = jax.jit(lj.lift(apply))(method.bind(trainable, frozen), X)
    base = jax.jit(apply)(params, X)
    if name in START:
        assert 0 < largest_difference(found, base) < START[name]
    else:
        assert np.array_equal(found, base)


@pytest.mark.parametrize(
    "name", few_fast("dora", "pissa", "vera", "lora_xs", "miss", "gained", without=UNMERGED)
)
def test_lifted_equals_merge_then_apply_without_materialising(name, float64):
    method = VARIANTS[name]
    _, trainable, frozen = trained(method)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float64), trainable)
    frozen = jax.tree.map(lambda x: x.astype(jnp.float64), frozen)
    x = X.astype(jnp.float64)

    def both(f):
        def loss(trainable, x):
            y = f(trainable, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(trainable, x)

    with lj.watch_materialised() as events:
        found = both(lambda t, x: lj.lift(apply)(method.bind(t, frozen), x))
    assert not events, [str(event) for event in events]
    expected = both(lambda t, x: apply(method.merge(t, frozen), x))
    assert largest_difference(found, expected) < 1e-9


@pytest.mark.parametrize("name", few_fast("dora"))
def test_adamw_trains_what_trains_and_leaves_fixed_parts_bit_for_bit(name):
    method = VARIANTS[name]
    params, trainable, frozen = started(method)
    tx = method.optimizer(optax.adamw(1e-2, weight_decay=0.5))
    state, start = tx.init(trainable), trainable
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state))
    sizes -= sum(leaf.size for leaf in jax.tree.leaves(tx.init({})))  # counts of steps
    assert sizes == 2 * method.table(params).num_trainable  # two moments, of what trains alone
    values = []

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(loss_of(method, frozen))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    for _ in range(6):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
    assert values[-1] < values[0]
    for path, entry in start.items():
        for part, before in entry.items():
            same = np.asarray(before).tobytes() == np.asarray(trainable[path][part]).tobytes()
            assert same == (part in method.FROZEN_PARTS), (path, part)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_counts_what_trains(name):
    method = VARIANTS[name]
    params, trainable, _ = started(method)
    for row in method.table(params):
        parts = {k: v for k, v in trainable[row.path].items() if k not in method.FROZEN_PARTS}
        assert row.num_trainable == sum(leaf.size for leaf in parts.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_norm_that_clips_sees_no_fixed_part(name):
    method = VARIANTS[name]
    _, trainable, frozen = trained(method)
    grads = jax.jit(jax.grad(loss_of(method, frozen)))(trainable)
    for entry in grads.values():
        assert not any(np.any(entry[part]) for part in method.FROZEN_PARTS if part in entry)


@pytest.mark.parametrize("name", few_fast())
def test_cells_of_a_variant_end_in_a_pack_where_they_end_alone(name, register):
    if name in OUTSIDE:
        register(name, OUTSIDE[name])
    own, targets = {"rank": RANKS.get(name, 2)}, ON.get(name, TARGETS)
    cells = [
        {"method": name, "targets": targets, "lr": 3e-3, "seed": 0, **own},
        {"method": name, "targets": targets, "lr": 1e-2, "seed": 1, "weight_decay": 0.1, **own},
    ]
    if VARIANTS[name].ZERO_PADDABLE:
        further = {"rank": own["rank"] - 1, "alpha": 2.0, "dropout": 0.2}
        unsupported = VARIANTS[name].UNSUPPORTED_SETTINGS
        cells[1] |= {key: value for key, value in further.items() if key not in unsupported}
    if "targets" in VARIANTS[name].ZERO_PADDABLE:
        cells[1]["targets"] = "plain|heads"
    cells = [{**cell, "train": "head"} for cell in cells]

    def of(batch_params, batch):
        return jnp.mean(apply(batch_params, batch) ** 2)

    def run(cells):
        return lj.sweep(
            of, params_of(), [X], cells, num_steps=8, axes=AXES, clip_norm=0.5, progress=False
        )

    together = run(cells)
    assert {row.pack for row in together} == {1} and all(row.width == 2 for row in together)
    for cell, row in zip(cells, together, strict=True):
        (alone,) = run([cell])
        assert np.max(np.abs(row.losses - alone.losses)) < 1e-5 and row.losses[-1] < row.losses[0]
        pairs = zip(jax.tree.leaves(row.trainable), jax.tree.leaves(alone.trainable), strict=True)
        assert max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) < 1e-4
        assert {p: jax.tree.map(jnp.shape, e) for p, e in row.trainable.items()} == {
            p: jax.tree.map(jnp.shape, e) for p, e in alone.trainable.items()
        }


def test_make_optimizer_takes_a_variants_parts():
    """Clipping, decay and rates of the trainer act on what trains alone."""
    method = VARIANTS["lora_fa"]
    _, trainable, frozen = trained(method)
    settings = OptimizerSettings(lr=1e-2, schedule="constant", weight_decay=0.1)
    tx = method.optimizer(make_optimizer(settings, 5))
    grads = jax.jit(jax.grad(loss_of(method, frozen)))(trainable)
    updates, _ = jax.jit(tx.update)(grads, tx.init(trainable), trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(trainable)
