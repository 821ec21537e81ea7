"""Does LoRA lose more than full fine-tuning when batches are large?

    make testbeds
    lora-jax sweep --config=batch_size --sweep=full_size --workdir=runs/batch
    python -m experiments.analysis batch_size runs/batch

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: MiniLM, 3,200 of WordNet's glosses once (`what_rank` has 6,400), in batches of 8, 32 and
128 (400, 100 and 25 steps): q,v at r = 8, all linear layers at r = 32, and full fine-tuning. Five
rates on seed 0, the best on validation with four more seeds.

The source: "LoRA Without Regret" (Schulman et al. 2025): with large batches LoRA falls behind
full fine-tuning, and a higher rank does not help: the gap is of the product of two matrices, not
of capacity.

Hypotheses, written before the run, margin 0.02 nats of test loss:
- gap_grows: the gap of q,v r = 8 to full at batch 128 is above that at batch 8 by more than the
margin.
- not_by_rank: so is the gap of all linear layers at r = 32.
Measured: experiments/results/batch_size/README.md.

Limits (a review, after the runs): withdrawn as a statement about batches. The head shared each
method's learning rate: with a head rate of its own (× 10, one seed) full fine-tuning at batch 128
goes from 1.158 to 0.877, and the gap to q,v r = 8 from -0.312 to -0.031. Fewer steps and larger
batches are confounded, and there is no probe arm.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

BATCHES = {8: 400, 32: 100, 128: 25}
ARMS = {
    "qv-r8": {"method.targets": "q,v", "method.rank": 8},
    "all-r32": {"method.targets": "all-linear", "method.rank": 32, "method.alpha": 64.0},
    "full": {"method.name": "full"},
}
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
FULL_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
MORE_SEEDS = (1, 2, 3, 4)


def sweep_full_size(add):
    """Three methods at three batch sizes and five rates, then four more seeds at the best."""
    for name, own in ARMS.items():
        rates = FULL_RATES if name == "full" else RATES
        for size, steps in BATCHES.items():
            sized = {"data.batch_size": size, "train.eval_every_steps": steps}
            tuned = {"tune": ("optimizer.lr", rates), "more_seeds": MORE_SEEDS}
            add(f"{name}-b{size}", **tuned, **own, **sized)


def sweep_smoke(add):
    """Two batch sizes, two rates and two seeds each."""
    for name, own in ARMS.items():
        rates = FULL_RATES if name == "full" else RATES
        for size in (8, 128):
            sized = {"data.batch_size": min(size, 32), "method.rank": 4}
            tuned = {"tune": ("optimizer.lr", rates[1:3]), "more_seeds": (1,)}
            add(f"{name}-b{size}", **tuned, **{**SMOKE, **own, **sized})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    return config_of(
        "batch_size", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA, {"data.limit": 3200}
    )
