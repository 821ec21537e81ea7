"""Tokens a second with and without a key-value cache, greedy, on SmolLM2-135M.

    python -m experiments.bench.decoding --out=experiments/results/bench

Random prompts of `--prompt` tokens, `--new` new ones, no token ends a text. Both ways are compiled
before, then taken in turn, `--times` times; ratios are medians of the pairs', the cache's seconds
over the other's. Without a cache each step runs the model over all prompt + new - 1 columns, those
to come included, since one compiled shape does for all steps: with equal numbers of both that is a
third more columns than the text has on average.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from experiments.bench.record import in_turn, write_record
from lora_jax.generate import Decoding, compile_first
from lora_jax.generate import generate_tokens as generate
from lora_jax.models import load_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", help="folder of the record (default: print only)")
    options = parser.parse_args(arguments)
    model = load_model(options.model)
    settings = Decoding(options.new, eos_token_ids=())
    batches = {}
    for batch in map(int, options.batches.split(",")):
        shape = (batch, options.prompt)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)

        def run(use_cache: bool, ids=ids):
            found = generate(model, model.params, ids, settings=settings, use_cache=use_cache)
            return jax.block_until_ready(found)

        compiling = {
            name: compile_first(
                model, model.params, ids, settings=settings, use_cache=name == "cache"
            )
            for name in ("cache", "no_cache")
        }
        record = in_turn(
            {"cache": lambda: run(True), "no_cache": lambda: run(False)}, times=options.times
        )
        tokens_per_s = {
            name: batch * options.new / seconds
            for name, seconds in record["median_seconds"].items()
        }
        batches[str(batch)] = {
            "tokens_per_s": tokens_per_s,
            "speedup": 1 / record["ratio"],
            "compile_seconds": compiling,
            **record,
        }
    what = {"model": options.model, "prompt_tokens": options.prompt, "new_tokens": options.new}
    dtype = str(jax.tree.leaves(model.params)[0].dtype)
    write_record("decoding", {**what, "dtype": dtype, "batches": batches}, options.out)


if __name__ == "__main__":
    main()
