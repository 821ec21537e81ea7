"""The loss over a large vocabulary, with all logits at once and in chunks: temporaries, compiled.

    python -m experiments.bench.chunked_loss --dtype=float32 --out=experiments/results/bench
    .venv-tpu/bin/python -m experiments.bench.chunked_loss --tpu=v5p:1x1x1 --out=…

Nothing is run: the value and its gradient by the states, 8,192 tokens of width 4,096 and a head of
128,256 words (Llama 3's), are compiled, and XLA says what they hold in addition to their
arguments. A chunk of 0 is the default, 256 MiB of logits at a time.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.record import write_record
from lora_jax.train.task import readout_tokens

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--chunks", default="8192,0,512,64", help="tokens at a time; 0: default")
    parser.add_argument("--tpu", help="a slice of one chip, such as v5p:1x1x1 (default: this CPU)")
    parser.add_argument("--out", help="folder of the record (default: print only)")
    options = parser.parse_args(arguments)
    where = None
    if options.tpu:
        from lora_jax.plan.topology import describe_topology

        where = jax.sharding.SingleDeviceSharding(describe_topology(options.tpu).devices[0])
    shape = (options.tokens, options.width, options.vocabulary)
    found = {
        chunk: temporaries(*shape, int(chunk), DTYPES[options.dtype], where)
        for chunk in options.chunks.split(",")
    }
    record = {
        "tokens": options.tokens, "width": options.width, "vocabulary": options.vocabulary,
        "dtype": options.dtype, "compiled_for": options.tpu or "cpu", "temp_bytes": found,
    }  # fmt: skip
    name = f"chunked_loss_{(options.tpu or 'cpu').partition(':')[0]}_{options.dtype}"
    write_record(name, record, options.out)


def temporaries(
    tokens: int, width: int, vocabulary: int, chunk: int, dtype: Any, where: Any = None
) -> int:
    """Bytes that the loss of `tokens` and its gradient hold in addition to their arguments."""

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(h, kernel, ids):
        batch = {"input_ids": ids, "loss_mask": jnp.ones_like(ids)}
        return readout_tokens(lambda h: h @ kernel, h, batch, chunk=chunk).losses.sum()

    arguments = (
        shaped((1, tokens, width), dtype),
        shaped((width, vocabulary), dtype),
        shaped((1, tokens), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
