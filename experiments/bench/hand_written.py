"""Lifted LoRA against a LoRA layer written by hand into the model: FLOPs, step time, trace time.

    python experiments/bench/hand_written.py --layers=24 --out=experiments/results/bench

Both are the same 24-layer encoder in Flax NNX: one with plain linear layers and `lift`, one whose
query and value layers hold `a` and `b` themselves. Same weights, same batch, same loss. Step times
are taken in turn in one process; the median of the pairs' ratios and its quartiles are what counts.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax as lj
from experiments.bench.encoder import encoder_config, random_encoder
from experiments.bench.record import in_turn, write_record
from lora_jax.models.bert.modeling import ALIASES, Bert, BertConfig
from lora_jax.models.functional import functional, unflatten
from lora_jax.models.layers import Linear

RANK, ALPHA = 8, 16.0


class HandWrittenLoRA(nnx.Module):
    """`x @ kernel + bias + scale * (x @ a) @ b`, as people write it into their models."""

    def __init__(self, linear: Linear):
        size_in, size_out = linear.kernel.shape
        self.kernel, self.bias = linear.kernel, linear.bias
        self.a = nnx.Param(jnp.zeros((size_in, RANK)))
        self.b = nnx.Param(jnp.zeros((RANK, size_out)))

    def __call__(self, x):
        low_rank = ((x @ self.a[...]) * (ALPHA / RANK)) @ self.b[...]
        return x @ self.kernel[...] + low_rank + jax.lax.broadcast_to_rank(self.bias[...], x.ndim)


def hand_written(config: BertConfig, *, rngs: nnx.Rngs) -> Bert:
    model = Bert(config, num_labels=2, pooling="mean", rngs=rngs)
    for layer in model.encoder.layers:
        layer.attention.query = HandWrittenLoRA(layer.attention.query)
        layer.attention.value = HandWrittenLoRA(layer.attention.value)
    return model


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", help="folder of the record (default: print only)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    config = encoder_config(
        layers=options.layers, width=options.width, vocabulary=1000, tokens=options.tokens
    )
    key = jax.random.key(0)
    params, plain = random_encoder(config, key)
    hand_shapes, by_hand = functional(lambda: hand_written(config, rngs=nnx.Rngs(0)))
    method = lj.LoRA(targets="q,v", rank=RANK, alpha=ALPHA, train="head/.*", aliases=ALIASES)
    trainable, frozen = method.init(jax.random.key(1), params)
    trainable = {
        path: {
            name: leaf if name != "b" else 0.02 * jax.random.normal(key, leaf.shape)
            for name, leaf in entry.items()
        }
        for path, entry in trainable.items()
    }
    ids = jax.random.randint(key, (options.batch, options.tokens), 0, 1000)
    mask = jnp.ones_like(ids)

    def loss(logits):
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0])

    def lifted_loss(trainable, frozen):
        return loss(lj.lift(plain)(method.bind(trainable, frozen), ids, mask))

    def hand_loss(trainable, frozen):
        return loss(by_hand(unflatten(_with_factors(trainable, frozen)), ids, mask))

    steps = {"lifted": sgd_step(lifted_loss), "hand-written": sgd_step(hand_loss)}

    def trace(name):
        # A new function each time: JAX would remember the trace of the old one.
        return jax.jit(lambda *args: steps[name](*args)).trace(trainable, frozen)

    trace_s = in_turn({name: lambda name=name: trace(name) for name in steps}, times=9)
    compiled = {name: trace(name).lower().compile() for name in steps}
    results = {name: program(trainable, frozen) for name, program in compiled.items()}
    difference = max(
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(*(jax.tree.leaves(result) for result in results.values()), strict=True)
    )
    step_s = in_turn(
        {
            name: lambda program=program: jax.block_until_ready(program(trainable, frozen))
            for name, program in compiled.items()
        },
        times=options.steps,
    )
    flops = {name: program.cost_analysis()["flops"] for name, program in compiled.items()}
    memory = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()
    }
    record = {
        "what": f"{options.layers} layers of width {options.width}, batch {options.batch} × "
        f"{options.tokens} tokens, r={RANK} on q,v",
        "flops_ratio": flops["lifted"] / flops["hand-written"],
        "temporary_bytes_ratio": memory["lifted"] / memory["hand-written"],
        "step_time": step_s,
        "trace_time": trace_s,
        "largest_difference_of_results": difference,
    }
    write_record("hand_written", record, options.out)


def _with_factors(trainable, frozen):
    """The hand-written model's parameters, by path."""
    whole = dict(_flat(frozen))
    for path, entry in trainable.items():
        layer = path.removesuffix("/kernel")
        whole |= (
            {f"{layer}/{name}": entry[name] for name in "ab"}
            if "a" in entry
            else {path: entry["value"]}
        )
    return whole


def sgd_step(loss):
    def step(trainable, frozen):
        value, grads = jax.value_and_grad(loss)(trainable, frozen)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, trainable, grads), value

    return step


def _flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif hasattr(value, "shape"):
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    main()
