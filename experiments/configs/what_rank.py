"""What rank does a task need, each at its own learning rate, and does full fine-tuning do better?

    make testbeds                                     # WordNet, once
    lora-jax sweep --config=what_rank --sweep=full_size --workdir=runs/what_rank
    python -m experiments.analysis what_rank runs/what_rank    # table, verdict, figure

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: MiniLM, glosses of WordNet's nouns to their 26 domains (`data/wordnet.py`; the largest
14%), 200 steps of 32 glosses, no gloss twice, cut at 16 tokens; AdamW, linear decay, alpha 16 for
all ranks, so that the scale is 16 / r. The head trains as well, at the same rate. Each arm at
six rates on seed 0, the best on validation with four more seeds; 1,500 validation and test glosses.

The source: Hu et al. 2021, Table 6 (GPT-3, one rate for all ranks): on q,v r = 1 is as good as
r = 64 (WikiSQL 73.4 and 73.5, noise 0.5; MNLI 91.3 and 91.4), on q alone r = 1 lacks 1.2 of r = 64
(68.8, 70.0), and q at r = 64 stays below q,v at r = 1. Table 18 (GPT-2 M, E2E): validation loss
falls from 1.23 at r = 1 to 1.16 at r = 16 and stays there up to 512.

Hypotheses, written before the run (a pilot of 300 steps on seed 0 had been seen: test loss 0.675 at
r = 1 and 0.630 at r = 8, at one rate), margin 0.02 nats of test loss:
- flat: r = 64 on q,v is equivalent to r = 8 (the 90% interval of their difference lies within the
  margin: two one-sided tests at 5%).
- low_rank: r = 1 on q,v is worse than r = 8 by more than the margin: not as in Table 6.
- q_alone: q at r = 64 is worse than q,v at r = 1, as in Table 6, by more than the margin.
- full: full fine-tuning beats q,v at r = 64 by more than the margin.
Measured: experiments/results/what_rank/README.md.

Limits (a review, after the runs): the head shared each method's learning rate. With a head rate of
its own (× 10, three seeds) full fine-tuning gains 0.088 [0.070, 0.106] and the gap to q,v r = 64
closes: `full` is a statement about the head. `low_rank` is a statement about alpha: r = 1 has scale
16 here, and at alpha = 2 r it equals r = 8 (tuned_per_rank). At twice the best rate two packings of
one config end 0.03 to 0.05 apart.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

RANKS = (1, 2, 4, 8, 64)
Q_RANKS = (1, 8, 64)
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
FULL_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
MORE_SEEDS = (1, 2, 3, 4)


def sweep_full_size(add):
    """q,v and q by rank, full fine-tuning and the frozen probe: 60 rates, then 40 more seeds."""
    tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": MORE_SEEDS}
    for targets, ranks in (("q,v", RANKS), ("q", Q_RANKS)):
        for rank in ranks:
            name = f"{targets.replace(',', '')}-r{rank}"
            add(name, **tuned, **{"method.targets": targets, "method.rank": rank})
    add("head", **tuned, **{"method.name": "head"})
    full = {"tune": ("optimizer.lr", FULL_RATES), "more_seeds": MORE_SEEDS}
    add("full", **full, **{"method.name": "full"})


def sweep_smoke(add):
    """The same arms, two rates and two seeds each."""
    tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
    for targets, ranks in (("q,v", RANKS[:4]), ("q", Q_RANKS[:2])):
        for rank in ranks:
            name = f"{targets.replace(',', '')}-r{rank}"
            add(name, **tuned, **SMOKE, **{"method.targets": targets, "method.rank": rank})
    add("head", **tuned, **SMOKE, **{"method.name": "head"})
    full = {"tune": ("optimizer.lr", FULL_RATES[1:3]), "more_seeds": (1,)}
    add("full", **full, **SMOKE, **{"method.name": "full"})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    return config_of("what_rank", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA)
