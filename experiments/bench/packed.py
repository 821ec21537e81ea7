"""K adapters in one program against K runs alone: seconds of steps, and with compilation.

    python -m experiments.bench.packed --cells=16 --out=experiments/results/bench

MiniLM's shapes with random weights, float32, `lj.sweep` each way: all cells as one pack, computed
side by side or one by one (`at_once`), and each cell by itself. Ranks 1, 2, 4, 8 on q,v, four
learning rates. The three are taken in turn, `--times` times; ratios are medians and quartiles of
the rounds' ratios, packed over the sum of the runs alone. Then one run alone at ever larger
batches: the most tokens a second it reaches is what the device is worth, and the pack's tokens a
second are given over it. A CPU is busy with one run already, so expect about 1 there and the saving
in compilation.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from experiments.bench.encoder import encoder_config, random_encoder
from experiments.bench.record import ratio_of, write_record
from lora_jax.models.bert.modeling import ALIASES

VOCABULARY = 30522


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--larger", default="8,16,32,64,128", help="batches of the run alone")
    parser.add_argument("--out", help="folder of the record (default: print only)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    config = encoder_config(
        layers=options.layers, width=options.width, vocabulary=VOCABULARY, tokens=512
    )
    params, apply = random_encoder(config, jax.random.key(0))

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

    def run(cells, batches, at_once=1):
        """Seconds of steps and of compiling, of all cells together."""
        rows = lj.sweep(
            loss,
            params,
            batches,
            cells,
            num_steps=options.steps,
            aliases=ALIASES,
            at_once=at_once,
            progress=False,
        )
        assert not any(row.error for row in rows)
        return sum(row.seconds for row in rows), sum(row.compile_seconds for row in rows)

    def batches_of(size):
        rng = np.random.default_rng(0)
        return [
            {
                "ids": rng.integers(0, VOCABULARY, (size, options.tokens)).astype(np.int32),
                "labels": rng.integers(0, 2, size).astype(np.int32),
            }
            for _ in range(options.steps)
        ]

    batches = batches_of(options.batch)
    run(cells[:1], batches)  # the first run of a process pays for more than itself
    taken = {"side_by_side": [], "one_by_one": [], "alone": []}
    for _ in range(options.times):
        taken["side_by_side"].append(run(cells, batches, at_once=0))
        taken["one_by_one"].append(run(cells, batches, at_once=1))
        each = [run([cell], batches) for cell in cells]
        taken["alone"].append(tuple(map(sum, zip(*each, strict=True))))
    sizes = [int(size) for size in options.larger.split(",")]
    tokens_per_s = {
        size: options.steps
        * size
        * options.tokens
        / statistics.median(run(cells[:1], batches_of(size))[0] for _ in range(options.times))
        for size in sizes
    }
    write_record("packed", record_of(options, taken, tokens_per_s), options.out)


def record_of(options, taken, tokens_per_s) -> dict:
    """The record of the seconds `taken` and of one run's tokens per second by batch."""
    medians = {
        name: [statistics.median(part) for part in zip(*values, strict=True)]
        for name, values in taken.items()
    }
    most = max(tokens_per_s.values())
    of_pack = options.cells * options.steps * options.batch * options.tokens

    def ratios(part):
        each = {name: [part(one) for one in values] for name, values in taken.items()}
        return {name: ratio_of(each[name], each["alone"]) for name in list(taken)[:2]}

    return {
        "what": f"{options.cells} cells, {options.layers} layers of width {options.width}, batch "
        f"{options.batch} × {options.tokens} tokens, {options.steps} steps, r 1-8 on q,v",
        "default_at_once": "one_by_one" if jax.default_backend() == "cpu" else "side_by_side",
        "median_step_seconds": {n: medians[n][0] for n in taken},
        "median_compile_seconds": {n: medians[n][1] for n in taken},
        "packed_over_alone_steps": ratios(lambda m: m[0]),
        "packed_over_alone_with_compilation": ratios(sum),
        "one_run_tokens_per_s_by_batch": tokens_per_s,
        "pack_tokens_per_s_over_the_most_of_one_run": {
            name: of_pack / medians[name][0] / most for name in list(taken)[:2]
        },
        "each_time": taken,
    }


if __name__ == "__main__":
    main()
