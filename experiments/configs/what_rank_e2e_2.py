"""Rank or place in a task without a new head: SmolLM2 on E2E (second edition of what_rank_e2e)

    lora-jax sweep --config=what_rank_e2e_2 --sweep=full_size --workdir=runs/what_rank_e2e_2
    python -m experiments.analysis what_rank_e2e_2 runs/what_rank_e2e_2

The argument is a size: none, or `smoke` (a tiny model on sentences made in code; sweep `smoke`, a
minute). The data are a folder with the E2E set's train.txt, valid.txt and test.txt at data.path.

Compared: SmolLM2-135M-Instruct (4-bit values expanded to float), 48 steps of 4 pairs of properties
and sentence, no dropout, no label smoothing. Changed after a review of `what_rank_e2e`: r = 1
stands at two conventions (alpha 32, the paper's, and alpha 8 r); all linear layers are an arm, so
that place and rank are separate; seeds 100 and 101 choose, seeds 0 to 7 are reported, each with its
own draw of 192 pairs; the loss (nats per token of the completion) is of 64 test prompts, which are
what is resampled. BLEU is left out: its standard error was 1 to 7 points.
Arms: q,v at r = 1 (alpha 32 and 8) and r = 4 (alpha 32); all linear layers at r = 4; full.

The source, Table 18 of Hu et al. 2021 (GPT-2 medium, one epoch of 42,000 pairs, one run each):
validation loss 1.23 at r = 1, 1.18 at 4, 1.16 from 16 to 512. Table 3: BLEU of full fine-tuning
68.2, LoRA 70.4.

Rule: where a best rate lies at the edge of its grid, the grid grows by a factor of two before any
reported seed runs.

Hypotheses, written before the runs (seen before: the first edition, r = 1 worse than 4 by 0.025
[0.005, 0.046] at alpha 32, full ahead of r = 4 by 0.073 [0.049, 0.097]), in nats per token:
- one: at alpha 32, r = 1 is worse than r = 4 by more than 0.01.
- one_2: at alpha 8 r, r = 1 is equivalent to r = 4 within 0.02.
- place: all linear layers at r = 4 are better than q,v at r = 4 by more than 0.02.
- full: full is better than q,v at r = 4 by more than 0.03.
- all_full: all linear layers at r = 4 are equivalent to full within 0.03.
Power, from the first edition (seed SD of a difference 0.0165, prompts' SD about 0.05): 8 seeds and
64 prompts find equivalence within 0.03 at a true difference of 0 with 85%.
Measured: experiments/results/what_rank_e2e_2/README.md.
"""

from ml_collections import ConfigDict

from .shared import E2E, TINY_PAIRS, config_of

ARMS = {
    "r1": {"method.rank": 1},
    "r1-a8": {"method.rank": 1, "method.alpha": 8.0},
    "r4": {"method.rank": 4},
    "all-r4": {"method.rank": 4, "method.targets": "all-linear"},
    "full": {"method.name": "full"},
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
FULL_RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
SEEDS = tuple(range(8))
CHOSEN = {"tune_seeds": (100, 101), "more_seeds": SEEDS, "tune_with": {"data.eval_limit": 160}}
SMOKE = {**TINY_PAIRS, "model.name": "tiny-llama", "train.eval_every_steps": 4}


def sweep_full_size(add):
    """Five arms at four rates, then eight seeds."""
    for name, own in ARMS.items():
        rates = FULL_RATES if name == "full" else RATES
        add(name, tune=("optimizer.lr", rates), **CHOSEN, **own)


def sweep_smoke(add):
    """The same arms of the tiny model, two rates and two seeds each."""
    chosen = {"tune_seeds": (100,), "more_seeds": (0, 1)}
    for name, own in ARMS.items():
        add(name, tune=("optimizer.lr", RATES[1:3]), **chosen, **SMOKE, **own)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    own = {
        "model.name": "smollm2-135m",
        "data.max_length": 96,  # the longest has 89 tokens
        "data.buckets": (64, 80, 96),
        "data.batch_size": 4,
        "data.eval_limit": 410,  # pairs: 64 prompts
        "optimizer.lr": 2e-3,
        "optimizer.warmup_ratio": 0.1,
        "train.num_steps": 48,
        "train.eval_every_steps": 48,
        "train.eval_batch_size": 16,
        "train.log_every_steps": 8,
    }
    return config_of("what_rank_e2e_2", arg, {"": {}, "smoke": SMOKE}, E2E, own)
