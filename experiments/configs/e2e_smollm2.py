"""LoRA on SmolLM2-135M and the E2E restaurants: how much rank does it take to repeat a prompt?

    lora-jax train --config=e2e_smollm2 --workdir=runs/e2e
    lora-jax train --config=e2e_smollm2:short --workdir=runs/e2e_short
    lora-jax sweep --config=e2e_smollm2 --sweep=rank --workdir=runs/e2e_rank

A prompt is a list of properties ("name : Blue Spice | area : riverside"), its completion a sentence
that says them. The model comes in a package (SmolLM2-135M-Instruct, a GGUF file), the data from
data.path: a folder with train.txt, valid.txt and test.txt, `properties||sentence` a line; the
default is next to the repository, from whose root the command is run. `:smoke` takes four steps
of a tiny model on sentences made in code, `--sweep=smoke` two ranks of it.

One epoch is 5,258 steps of 8 pairs. LoRA of rank 4 and alpha 32 on query and value, dropout 0.1,
weight decay 0.01, label smoothing 0.1, 500 steps of warm-up and a linear decay are the paper's
settings for GPT-2 (Table 11); the rate is a guess, and `rank` tunes it for each rank on the
validation loss, then adds seeds.

The paper's twin of this is GPT-2 medium on E2E by rank (Table 18, one run each, one rate for all):
validation loss 1.23 nats a token at rank 1, 1.18 at 4, 1.16 from 16 to 512, BLEU between 68.7 and
70.4 without an order. Other tokens here, so only the shape of that is to be compared.

Measured here, `:short` (240 steps, one seed, 17 minutes of 2 cores, an hour with other work
running): validation NLL 1.67 at 40 steps, 1.40 at 240; BLEU over 37 prompts 0 before, 65 after (54
where the prompt's 4-grams may not be said again); experiments/results/e2e_smollm2. The sweep has
not been run.
"""

from ml_collections import ConfigDict

from .shared import E2E, TINY_PAIRS, config_of

RANKS = (1, 2, 4, 8, 64)
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
MORE_SEEDS = (1, 2)

SIZES = {
    "": {},
    # What half an hour on two cores allows.
    "short": {
        "data.eval_limit": 240,
        "train.num_steps": 240,
        "train.eval_every_steps": 40,
        "train.log_every_steps": 10,
        "optimizer.warmup_steps": 20,
    },
    "smoke": {
        **TINY_PAIRS,
        "model.name": "tiny-llama",
        "train.eval_every_steps": 2,
        "train.log_every_steps": 2,
        "optimizer.warmup_steps": 2,
    },
}


def sweep_rank(add):
    """Every rank at five rates, then two more seeds at the best."""
    for rank in RANKS:
        tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": MORE_SEEDS}
        add(f"r{rank}", **tuned, **{"method.rank": rank})


def sweep_smoke(add):
    """Two ranks of the smoke size."""
    for rank in (1, 4):
        add(f"r{rank}", **SIZES["smoke"], **{"method.rank": rank})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: a size, "", "short" or "smoke"."""
    own = {
        "model.name": "smollm2-135m",
        # data.source may be jsonl, csv, tsv or parquet with the columns `prompt`, `completion`.
        "data.max_length": 128,  # the longest pair has 125 tokens
        "data.buckets": (48, 64, 80, 128),
        "data.batch_size": 8,
        "data.eval_limit": 0,  # validation and test pairs, by whole prompts
        "method.dropout": 0.1,
        "optimizer.lr": 1e-3,
        "optimizer.warmup_steps": 500,
        "train.num_epochs": 1.0,
        "train.label_smoothing": 0.1,
        "train.eval_batch_size": 32,
        "train.log_every_steps": 50,
    }
    return config_of("e2e_smollm2", arg, SIZES, E2E, own)
