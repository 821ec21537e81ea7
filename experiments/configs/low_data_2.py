"""Is LoRA better than full fine-tuning where examples are few? (second edition of low_data)

    lora-jax sweep --config=low_data_2 --sweep=full_size --workdir=runs/low_data_2
    python -m experiments.analysis low_data_2 runs/low_data_2

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: MiniLM on 64 and on 1,024 movie reviews, cut at 24 tokens, 80 steps of 32 in each: q,v at
r = 8 (alpha 16), full fine-tuning and the frozen probe. Changed after a review of `low_data`: each
of ten seeds draws its own reviews of 7,500 (so that intervals hold what another draw would change),
head and body have rates of their own, both tuned, and seeds 100 and 101 choose. Of two evaluations
the one with the best validation loss counts (1,000 validation reviews, which favours overfitting
in all arms alike); tested on all 2,256.

The source, Table 16 of Hu et al. 2021 (MNLI on GPT-3, accuracy at 100, 1k, 10k, 392k examples):
full 60.2, 85.8, 88.9, 89.5; LoRA 63.8, 85.6, 89.2, 91.7; prefix methods far below at 100.

Rule: where a best rate lies at the edge of its grid, the grid grows by a factor of three before any
reported seed runs.

Hypotheses, written before the runs, margin 0.02 nats of test loss:
- few: at 64 reviews full fine-tuning is worse than LoRA.
- many: at 1,024 LoRA is equivalent to full fine-tuning.
- probe: at 64 reviews the frozen probe is not worse than LoRA by more than the margin.
- gap_by_size: full's disadvantage to LoRA is larger at 64 than at 1,024, by more than the margin.
Power, from the first edition (seed SD of a difference 0.013, on one draw; taken as 0.02 with draws;
SD over examples 0.33): 10 seeds find equivalence at a true difference of 0 with 23%, `few` at 0.05
with 81%.
Measured: experiments/results/low_data_2/README.md.
"""

from ml_collections import ConfigDict

from .shared import LORA, MINILM, SMOKE, config_of

SIZES = (64, 1024)
ARMS = {
    "qv-r8": {},
    "probe": {"method.name": "head"},
    "full": {"method.name": "full"},
}
RATES = {
    "qv-r8": (3e-4, 1e-3, 3e-3, 1e-2),
    "probe": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
}
HEAD_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = tuple(range(10))
CHOSEN = {
    "tune_seeds": (100, 101),
    "more_seeds": SEEDS,
    "tune_with": {"data.eval_limit": 1000},
}


def sweep_full_size(add):
    """Three methods on two sizes, rates of body and head tuned, then ten seeds, a draw each."""
    for name, own in ARMS.items():
        for size in SIZES:
            grid = {"optimizer.lr": RATES[name]}
            if name != "probe":
                grid["optimizer.head_lr"] = HEAD_RATES
            add(f"{name}-n{size}", tune=grid, **CHOSEN, **own, **{"data.draw": size})


def sweep_smoke(add):
    """The same arms on draws of 16 and 32, two rates and two seeds each."""
    for name, own in ARMS.items():
        for size in SIZES:
            small = {**SMOKE, **own, "data.draw": 16 if size == 64 else 32}
            chosen = {"tune_seeds": (100,), "more_seeds": (0, 1)}
            add(f"{name}-n{size}", tune=("optimizer.lr", RATES[name][1:3]), **chosen, **small)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    own = {
        "model.num_labels": 2,
        "data.source": "reviews",
        "data.max_length": 24,
        "data.buckets": (24,),
        "optimizer.lr": 1e-3,
        "train.num_steps": 80,
        "train.eval_every_steps": 40,
    }
    return config_of("low_data_2", arg, {"": {}, "smoke": SMOKE}, MINILM, LORA, own)
