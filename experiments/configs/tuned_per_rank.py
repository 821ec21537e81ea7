"""Is performance flat in rank because each rank had its own learning rate? A question of our own.

    make testbeds
    lora-jax sweep --config=tuned_per_rank --sweep=full_size --workdir=runs/tuned
    python -m experiments.analysis tuned_per_rank runs/tuned

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Papers compare ranks at one rate (Hu et al. 2021, Table 6) or at rates of their own (variants of
LoRA, "LoRA Without Regret"), and scale ΔW by alpha / r with alpha fixed, by alpha / r with alpha
= 2 r, or by alpha / √r. No one asked how much of "flat in rank" each of these choices makes.
Here: MiniLM, WordNet's glosses as in `what_rank`, q,v, r = 1, 4, 16, 64, three conventions that
agree at r = 8: alpha = 16 (scale 16 / r), alpha = 2 r (scale 2), rsLoRA with alpha = 2 √8 (scale
5.7 / √r); six rates each, seed 0 and the best with one more. For each convention: the spread over
ranks of the validation loss (largest less smallest) with rates tuned per rank, and at the one
rate that is best for the mean.

Hypotheses, written before the run (of `what_rank`, alpha = 16, seed 0 up to r = 8 had been seen:
5e-3 is best for all of them), margin 0.02 nats:
- fixed_alpha: with alpha = 16 one shared rate adds less than the margin to the spread.
- alpha_2r: with alpha = 2 r it adds more than the margin: there tuning per rank makes the
flatness.
- tuned_is_tuned: with rates tuned per rank the three conventions differ by less than the margin
at every rank, so that a convention is a choice of rates and no more.
Measured: experiments/results/tuned_per_rank/README.md.

Limits (a review, after the runs): all three verdicts compare point estimates of validation loss, of
the one or two seeds that also chose the rates, without an interval. On test, two seeds, r = 1
differs by 0.040 (seeds 0.059, 0.021) between the conventions, not 0.075. The head shared each arm's
learning rate.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

RANKS = (1, 4, 16, 64)
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
CONVENTIONS = {
    "alpha16": lambda rank: {"method.alpha": 16.0},
    "alpha2r": lambda rank: {"method.alpha": 2.0 * rank},
    "rslora": lambda rank: {"method.name": "rslora", "method.alpha": 2.0 * 8**0.5},
}


def sweep_full_size(add):
    """Three conventions at four ranks and six rates, then one more seed at the best."""
    for name, of_rank in CONVENTIONS.items():
        for rank in RANKS:
            tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": (1,)}
            add(f"{name}-r{rank}", **tuned, **{"method.rank": rank, **of_rank(rank)})


def sweep_smoke(add):
    """Two ranks, two rates and two seeds each."""
    for name, of_rank in CONVENTIONS.items():
        for rank in (1, 4):
            tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
            add(f"{name}-r{rank}", **tuned, **SMOKE, **{"method.rank": rank, **of_rank(rank)})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    return config_of("tuned_per_rank", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA)
