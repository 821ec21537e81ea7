"""K adapters in one program against K runs alone: seconds of steps, and with compilation.

    python -m experiments.bench.packed --cells=16 --out=experiments/results/bench

MiniLM's shapes with random weights, float32, `lj.sweep` either way: once with all cells, once for
each cell by itself. Ranks 1, 2, 4, 8 on q,v, four learning rates. Packed and alone are taken in
turn, `--times` times; the ratios are packed over the sum of the runs alone. `pack_against_one` is
examples a second of the pack over those of one run at the same batch; on a CPU one run fills the
cores already, so expect about 1 there and the saving in compilation.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax as lj
from experiments.bench.record import write_record
from lora_jax.models.bert import ALIASES, Bert, BertConfig
from lora_jax.models.functional import functional, unflatten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", help="folder of the record (default: print only)")
    options = parser.parse_args()
    config = BertConfig(
        vocab_size=30522,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        intermediate_size=4 * options.width,
        max_position_embeddings=512,
    )
    shapes, apply = functional(lambda: Bert(config, num_labels=2, pooling="mean", rngs=nnx.Rngs(0)))
    key = jax.random.key(0)
    flat = {
        path: 0.02 * jax.random.normal(jax.random.fold_in(key, n), leaf.shape)
        + path.endswith("norm/scale")
        for n, (path, leaf) in enumerate(shapes.items())
    }
    params = unflatten(flat)
    rng = np.random.default_rng(0)
    shape = (options.batch, options.tokens)
    batches = [
        {
            "ids": rng.integers(0, 30000, shape).astype(np.int32),
            "labels": rng.integers(0, 2, options.batch).astype(np.int32),
        }
        for _ in range(options.steps)
    ]

    def loss(params, batch):
        logits = apply(params, batch["ids"], jnp.ones_like(batch["ids"]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    cells = [
        {
            "targets": "q,v",
            "rank": (1, 2, 4, 8)[n % 4],
            "lr": (2e-4, 5e-4, 1e-3, 2e-3)[n // 4 % 4],
            "seed": n,
            "train": "head/.*",
        }
        for n in range(options.cells)
    ]

    def run(cells):
        rows = lj.sweep(
            loss,
            params,
            batches,
            cells,
            num_steps=options.steps,
            aliases=ALIASES,
            progress=False,
        )
        assert not any(row.error for row in rows)
        return sum(row.seconds for row in rows), sum(row.compile_seconds for row in rows)

    taken = {"packed": [], "alone": []}
    for _ in range(options.times):
        steps, compiling = run(cells)
        taken["packed"].append((steps, compiling))
        each = [run([cell]) for cell in cells]
        taken["alone"].append(tuple(map(sum, zip(*each, strict=True))))
    medians = {
        name: [statistics.median(part) for part in zip(*values, strict=True)]
        for name, values in taken.items()
    }
    steps, whole = ([medians[n][0] for n in taken], [sum(medians[n]) for n in taken])
    record = {
        "what": f"{options.cells} cells, {options.layers} layers of width {options.width}, batch "
        f"{options.batch} × {options.tokens} tokens, {options.steps} steps, r 1-8 on q,v",
        "median_step_seconds": {n: medians[n][0] for n in taken},
        "median_compile_seconds": {n: medians[n][1] for n in taken},
        "packed_over_alone_steps": steps[0] / steps[1],
        "packed_over_alone_with_compilation": whole[0] / whole[1],
        "pack_against_one_examples_per_s": steps[1] / steps[0],
        "each_time": taken,
    }
    write_record("packed", record, options.out)


if __name__ == "__main__":
    main()
