"""How likely does an adapter die, by learning rate, alpha and rank?

    make testbeds
    lora-jax sweep --config=collapse --sweep=full_size --workdir=runs/collapse
    python -m experiments.analysis collapse runs/collapse

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

A run has died, or collapsed, when its test loss after training is that of the classes' prior: the
adapter has destroyed the features, and the head says the same of every text. Reports of LoRA give
the best learning rate; nobody found here gives how near the cliff it stands.

Compared: MiniLM on WordNet's glosses, q,v at r = 1, 4, 16, 64 by alpha 4, 16, 64 by eight rates a
factor of 1.6 apart by ten seeds: 960 runs of 100 steps of 16 glosses, each seed its own draw, the
head's rate 1e-2 in all; tested on 500 glosses. Cells of one rank's bucket share a program.

A logistic regression of having died on log rate, log alpha and log rank, over all runs, gives the
rate at which half the runs die as rate ∝ alpha^-p · rank^-q. Its interval is a jackknife over
seeds.

Hypotheses, written before the runs (of the first edition, with a tied head: at alpha 16 all ranks
lived at 1e-2 and died at 2e-2):
- by_rank: from r = 1 to 64 at fixed alpha the rate of half the runs' death changes by less than a
  factor of 1.5 (equivalence, ±0.176 in log10; note that alpha / r is the scale).
- by_alpha_low: it falls with alpha: p is above 0.3.
- by_alpha_high: and slower than alpha: p is not above 1.
Measured: experiments/results/collapse/README.md.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

RANKS = (1, 4, 16, 64)
ALPHAS = (4.0, 16.0, 64.0)
RATES = (4e-3, 6.4e-3, 1.02e-2, 1.64e-2, 2.62e-2, 4.19e-2, 6.71e-2, 1.07e-1)
SEEDS = tuple(range(10))


def _cells(add, ranks, alphas, rates, seeds, **more):
    for rank in ranks:
        for alpha in alphas:
            for rate in rates:
                for seed in seeds:
                    name = f"r{rank}-a{alpha:g}-lr{rate:g}-s{seed}"
                    own = {"method.rank": rank, "method.alpha": alpha, "optimizer.lr": rate}
                    add(name, **own, **more, seed=seed)


def sweep_full_size(add):
    """Four ranks, three alphas, eight rates, ten seeds."""
    _cells(add, RANKS, ALPHAS, RATES, SEEDS)


def sweep_smoke(add):
    """Two ranks, two alphas, three rates and three seeds of the tiny model."""
    _cells(add, (1, 4), (4.0, 64.0), RATES[::3], (0, 1, 2), **SMOKE)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    own = {
        "data.source": "wordnet-2",
        "data.limit": 0,
        "data.eval_limit": 500,
        "data.batch_size": 16,
        "optimizer.head_lr": 1e-2,
        "train.num_epochs": 0.0,
        "train.num_steps": 100,
        "train.eval_every_steps": 100,
        "train.log_every_steps": 100,
    }
    return config_of("collapse", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA, own)
