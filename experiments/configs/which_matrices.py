"""Which matrices, at an equal budget? And MLP against attention? (Hu et al. 2021, Table 5)

    make testbeds
    lora-jax sweep --config=which_matrices --sweep=full_size --workdir=runs/which
    python -m experiments.analysis which_matrices runs/which

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: MiniLM, glosses of WordNet's nouns to their 26 domains, as in `what_rank`: 200 steps of 32
glosses of at most 16 tokens, alpha 2 r, so that every arm has scale 2. Equal budgets: 36,864
parameters (q, k, v or o at r = 8; q,k and q,v at r = 4; all four at r = 2), and 92,160 for MLP
(up and down, r = 4) against attention (all four, r = 5). Five rates on seed 0, the best on
validation with four more seeds.

The source: Table 5 (GPT-3, 18 M): WikiSQL q 70.4, k 70.0, v 73.0, o 73.2, qk 71.4, qv 73.7, qkvo
73.7; MNLI 91.0 90.8 91.0 91.3 91.3 91.3 91.7. "LoRA Without Regret" (2025): adapters of attention
alone are worse than of the MLP alone, even with more parameters (r = 256, 0.25 B; r = 128, 0.24 B).

Hypotheses, written before the run (of `what_rank` seed 0 had been seen: validation loss 0.720 with
q and 0.680 with q,v at r = 8), margin 0.02 nats of test loss:
- spread: q at r = 8 is worse than all four at r = 2 by more than the margin, as in Table 5.
- k_alone: k at r = 8 is worse than v at r = 8 by more than the margin, as in Table 5.
- pair: q,v at r = 4 is equivalent to all four at r = 2 (90% interval within the margin).
- value_or_pair: v at r = 8 is worse than q,v at r = 4 by more than the margin (Table 5: by 0.7).
- mlp: attention is worse than the MLP at equal parameters by more than the margin.
Measured: experiments/results/which_matrices/README.md.

Limits (a review, after the runs): the head shares each arm's learning rate, and the glosses are one
draw. Read from two pages, the MLP at r = 4 (92,160 parameters) is ahead of q,v at r = 64 of
what_rank (589,824) by 0.019 [0.005, 0.032] (seeds only): a question of place, not tested here.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

# name: targets, rank
ARMS = {
    "q-r8": ("q", 8),
    "k-r8": ("k", 8),
    "v-r8": ("v", 8),
    "o-r8": ("o", 8),
    "qk-r4": ("q,k", 4),
    "qv-r4": ("q,v", 4),
    "qkvo-r2": ("q,k,v,o", 2),
    "attention-r5": ("q,k,v,o", 5),
    "mlp-r4": ("up,down", 4),
}
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
MORE_SEEDS = (1, 2, 3, 4)


def sweep_full_size(add):
    """Nine choices of matrices at five rates, then four more seeds at the best."""
    for name, (targets, rank) in ARMS.items():
        tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": MORE_SEEDS}
        own = {"method.targets": targets, "method.rank": rank, "method.alpha": 2.0 * rank}
        add(name, **tuned, **own)


def sweep_smoke(add):
    """The same arms, two rates and two seeds each."""
    for name, (targets, rank) in ARMS.items():
        tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
        own = {"method.targets": targets, "method.rank": rank, "method.alpha": 2.0 * rank}
        add(name, **tuned, **SMOKE, **own)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    return config_of("which_matrices", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA)
