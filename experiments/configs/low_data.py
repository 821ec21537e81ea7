"""Is LoRA better than full fine-tuning where examples are few? (Hu et al. 2021, Table 16)

    lora-jax sweep --config=low_data --sweep=full_size --workdir=runs/low
    python -m experiments.analysis low_data runs/low

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: MiniLM on 64, 256, 1,024 and 4,096 movie reviews (the largest split has 7,500), cut at 24
tokens, 80 steps of 32 in each (so 40 epochs of the least): q,v at r = 8, full fine-tuning and the
frozen probe. Each size is one draw of reviews, the same for all seeds: the intervals do not hold
what another draw would change. Five rates on seed 0, the best on validation with four more seeds;
of two evaluations the better on validation counts. The validation split has 1,000 reviews
whatever the size, which favours whoever overfits, equally. At 64, and for full fine-tuning at 256,
the smallest rate was the best: two smaller ones were added once that was seen, in the same sweep
(none was better).

The source, Table 16 (MNLI on GPT-3, accuracy at 100, 1k, 10k, 392k examples): full 60.2, 85.8,
88.9, 89.5; LoRA 63.8, 85.6, 89.2, 91.7; prefix methods far below at 100.

Hypotheses, written before the run, margin 0.02 nats of test loss:
- few: at 64 reviews LoRA is better than full fine-tuning by more than the margin.
- many: at 4,096 the two are equivalent (90% interval within the margin).
- probe: at 64 reviews the frozen probe is not worse than LoRA by more than the margin (nothing but
  the head can be learned from so few).
Measured: experiments/results/low_data/README.md.

Limits (a review, after the runs): the head shared each method's learning rate. `few` loses its
exclusion of 0 once the seed that chose the rate is left out ([-0.036, +0.007], seeds only), as
published it is one draw of reviews per size.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

SIZES = (64, 256, 1024, 4096)
ARMS = {
    "qv-r8": {"method.targets": "q,v", "method.rank": 8},
    "head": {"method.name": "head"},
    "full": {"method.name": "full"},
}
RATES = {
    "qv-r8": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "head": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "full": (2e-5, 5e-5, 1e-4, 3e-4, 1e-3),
}
# Added after a first sweep, whose best rates were the smallest for these.
LOWER = {
    "qv-r8-n64": (3e-5, 1e-4),
    "head-n64": (1e-4, 3e-4),
    "full-n64": (5e-6, 1e-5),
    "full-n256": (5e-6, 1e-5),
}
MORE_SEEDS = (1, 2, 3, 4)
OWN = {
    "model.num_labels": 2,
    "data.source": "reviews",
    "data.max_length": 24,
    "data.buckets": (24,),
    "data.eval_limit": 1000,
    "train.num_steps": 80,
    "train.num_epochs": 0.0,
    "train.eval_every_steps": 40,
}


def sweep_full_size(add):
    """Three methods on four sizes at five rates, then four more seeds at the best."""
    for name, own in ARMS.items():
        for size in SIZES:
            cell = f"{name}-n{size}"
            rates = (*LOWER.get(cell, ()), *RATES[name])
            tuned = {"tune": ("optimizer.lr", rates), "more_seeds": MORE_SEEDS}
            add(cell, **tuned, **own, **{"data.limit": size})


def sweep_smoke(add):
    """One size, two rates and two seeds each."""
    for name, own in ARMS.items():
        tuned = {"tune": ("optimizer.lr", RATES[name][1:3]), "more_seeds": (1,)}
        add(f"{name}-n64", **tuned, **SMOKE, **own)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    return config_of("low_data", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA, OWN)
