"""A small scanned model and eight cells of every kind: what the tests of sweeps train."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.core.lift import lift
from lora_jax.sweeps import api, in_memory
from lora_jax.train.build import keys_of
from tests.core.adapted import normal

D, WIDE = 12, 20
STEPS = 50


def base():
    rng = np.random.default_rng(0)
    shapes = {"layers": (2, D, D), "up": (D, WIDE), "down": (WIDE, D), "head": (D, 3)}
    return {name: normal(rng, shape, scale=shape[-2] ** -0.5) for name, shape in shapes.items()}


def logits(params, x):
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["layers"])
    return (h + jax.nn.gelu(h @ params["up"]) @ params["down"]) @ params["head"]


def loss_fn(params, batch):
    scores = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


def batches_of(seed, count=STEPS, size=16):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = rng.normal(size=(size, D)).astype(np.float32)
        made.append({"x": x, "y": (np.abs(x[:, :3]).argmax(1)).astype(np.int32)})
    return made


AXES = lj.kernel_axes(logits, base(), jnp.ones((4, D)))
VALIDATION = batches_of(99, 2)
CELLS = [
    {"targets": "up", "rank": 1, "lr": 3e-3, "alpha": 1.0, "seed": 0},
    {"targets": "up", "rank": 4, "lr": 1e-2, "alpha": 8.0, "seed": 1, "weight_decay": 0.1},
    {"targets": ("up", "down"), "rank": 2, "lr": 1e-2, "alpha": 4.0, "seed": 2, "dropout": 0.2},
    {"targets": "layers", "rank": 8, "lr": 3e-3, "alpha": 16.0, "seed": 3, "weight_decay": 0.01},
    {"targets": ".*[^d]", "rank": 3, "lr": 1e-3, "alpha": 3.0, "seed": 4, "dropout": 0.5},
    {"targets": "down", "rank": 8, "lr": 2e-2, "alpha": 2.0, "seed": 5},
    {"targets": "layers", "rank": 1, "lr": 1e-2, "alpha": 2.0, "seed": 6, "init": "gaussian"},
    {"targets": "up", "rank": 8, "lr": 5e-3, "alpha": 8.0, "seed": 7, "weight_decay": 1.0},
]
CELLS = [{**cell, "train": "head"} for cell in CELLS]
# The same without dropout, whose masks take most of the time that the step takes to compile.
DRY = [{name: value for name, value in cell.items() if name != "dropout"} for cell in CELLS]


def alone(cell, batches, tx=None):
    """The cell by itself, at its true rank, in the plainest loop: optax's AdamW, no pack."""
    method = lj.LoRA(
        **{k: v for k, v in cell.items() if k not in ("lr", "weight_decay", "seed")}, axes=AXES
    )
    _, init_key, run_key = keys_of(cell["seed"])
    trainable, frozen = method.init(init_key, base())
    tx = tx or optax.adamw(cell["lr"], weight_decay=cell.get("weight_decay", 0.0))
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state, batch, key):
        def loss(trainable):
            return lift(loss_fn)(method.bind(trainable, frozen, key=key), batch)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for n, batch in enumerate(batches):
        key = jax.random.fold_in(run_key, n)
        trainable, state, value = step(trainable, state, batch, key)
        losses.append(float(value))
    return trainable, np.array(losses)


def training_of(cells, *, batches=batches_of, **options):
    """The one pack of these cells, as `sweep` trains it, and its results."""
    made = []
    original = in_memory.PackTraining
    options = {"num_steps": STEPS, "axes": AXES, "progress": False, **options}
    try:
        in_memory.PackTraining = lambda *args: made.append(original(*args)) or made[-1]
        results = api.sweep(loss_fn, base(), batches, cells, **options)
    finally:
        in_memory.PackTraining = original
    assert len(made) == 1
    return made[0], results
