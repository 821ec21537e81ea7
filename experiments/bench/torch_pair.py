"""Seconds per training step of MiniLM, here and in peft + torch, taken in turn in one run.

    make bench      or      python -m experiments.bench.torch_pair --torch=.venv-torch/bin/python

32 × 64 tokens, two threads, float32, AdamW: LoRA r = 8 on q,v and on all linear layers, and full
fine-tuning. In a round each of the six takes STEPS steps in a row, of which the first is not timed:
in a training a step follows one of its own, not one of another program that left the caches and the
large pages cold (seen: 0.75 s became 1.19 s). That was decided after two runs with single steps in
turn, in which here / torch was 0.86 on q,v, 1.17 on all linears and 1.15 for full fine-tuning (the
second; the first had 0.82 for full), so both protocols should be known. The ratios are the
medians and quartiles of the rounds' ratios; records before December 2026 give the ratio of the
medians. torch runs the attention that was faster there in one short run each ("eager": 0.73, 1.06,
1.14 s; "sdpa": 0.82, 1.12, 1.19 s).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

import lora_jax as lj
from experiments.bench.record import ratio_of, write_record
from lora_jax.models import Model
from lora_jax.models.sources import find_source
from lora_jax.train import init_state, make_train_step
from lora_jax.train.loss import make_loss

ARMS = ("lora-qv", "lora-all", "full")
STEPS = 3


class Torch:
    """The worker process; `step(name)` is the seconds that one step took there."""

    def __init__(self, python: str, folder: str, data: str, threads: int):
        worker = Path(__file__).with_name("torch_worker.py")
        self.process = subprocess.Popen(
            [python, str(worker), folder, data, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Its threads must sleep, not spin, while it is our turn.
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"},
        )
        self.version = json.loads(self.process.stdout.readline())["torch"]

    def step(self, name: str) -> float:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]


class Here:
    def __init__(self, model: Model, batch: dict):
        self.batch, self.made = batch, {}
        lora = {"rank": 8, "alpha": 16.0, "train": "head/.*", "aliases": model.aliases}
        methods = {
            "lora-qv": lj.LoRA(targets="q,v", **lora),
            "lora-all": lj.LoRA(targets="all-linear", **lora),
            "full": lj.FullFineTuning(),
        }
        tx = optax.adamw(1e-4, weight_decay=0.01)
        for name, method in methods.items():
            trainable, frozen = method.init(jax.random.key(0), model.params)
            step = make_train_step(make_loss(model.apply, method), tx)
            self.made[name] = [step, init_state(trainable, tx, jax.random.key(1)), frozen]

    def step(self, name: str) -> float:
        step, state, frozen = self.made[name]
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, self.batch))
        self.made[name][1] = state
        return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", required=True, help="a Python with torch, transformers, peft")
    parser.add_argument("--model", default="minilm", help="a BERT: packaged, or a folder")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", help="folder of the record (default: print only)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds={options.rounds}: quartiles need at least 2")
    model = lj.load_model(options.model, head="classification", num_labels=2)
    rng, shape = np.random.default_rng(0), (options.batch, options.tokens)
    batch = {
        "input_ids": (rng.integers(1000, 20000, shape) % model.config.vocab_size).astype(np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "labels": rng.integers(0, 2, options.batch).astype(np.int32),
        "weights": np.ones(options.batch, np.float32),
    }
    threads = len(os.sched_getaffinity(0))
    seconds = {f"{side} {name}": [] for name in ARMS for side in ("here", "torch")}
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "batch.npz")
        np.savez(data, **batch)
        there = Torch(options.torch, str(find_source(options.model)), data, threads)
        here = Here(model, batch)
        for number in range(options.rounds + 1):
            for name in ARMS:
                sides = [("here", here), ("torch", there)]
                for side, runner in sides if number % 2 else reversed(sides):
                    took = [runner.step(name) for _ in range(STEPS)][1:]
                    if number >= 1:  # the first round compiles and warms up
                        seconds[f"{side} {name}"].append(statistics.mean(took))
        there.process.stdin.close()
        there.process.wait()

    def ratio(top: str, bottom: str) -> dict:
        return ratio_of(seconds[top], seconds[bottom])

    record = {
        "what": f"{options.model}, {options.batch} × {options.tokens} tokens, "
        f"{threads} threads, float32",
        "median_seconds": {name: statistics.median(took) for name, took in seconds.items()},
        "here_over_torch": {n: ratio(f"here {n}", f"torch {n}") for n in ARMS},
        "lora_over_full_here": {n: ratio(f"here {n}", "here full") for n in ARMS[:2]},
        "lora_over_full_torch": {n: ratio(f"torch {n}", "torch full") for n in ARMS[:2]},
        "rounds": options.rounds,
        "timed_steps_a_round": STEPS - 1,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "torch": there.version,
    }
    write_record("torch_pair", record, options.out)


if __name__ == "__main__":
    main()
