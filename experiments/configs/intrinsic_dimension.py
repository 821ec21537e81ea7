"""The intrinsic dimension of fine-tuning MiniLM, DID and SAID (Aghajanyan et al. 2020)

    make testbeds
    lora-jax sweep --config=intrinsic_dimension --sweep=full_size --workdir=runs/dim
    python -m experiments.analysis intrinsic_dimension runs/dim

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute; its
page needs --beside=… of `what_rank`'s smoke).

Compared: MiniLM, glosses of WordNet's nouns to their 26 domains as in `what_rank` (200 steps of 32
glosses of at most 16 tokens). All parameters of the encoder's layers and the new head, 10.7
million, move in a random subspace of d dimensions: DID, and SAID with a scale for each of six
layers and the head. P is "grouped" (each parameter belongs to one of d groups, which moves by one
number, PᵀP = 1), a seventh of Fastfood's time at this size on a CPU; `intrinsic_digits` has
Fastfood next to a dense P. Each d at five rates on seed 0, the best on validation with two more
seeds; the grid went from 1e-3 to 1e-1 until at d = 100 to 1,000 the largest was seen to be the best
(the cells of then are kept), and d = 5,000 was added when 3,000 and 10,000 could not decide
"small". A seed is another subspace, another head, another order. d₉₀ is the smallest d whose mean
test accuracy is 90% of full fine-tuning's in `what_rank`, which also moves the embeddings.

The source: Aghajanyan et al. 2020 (arXiv:2012.13255), Table 1: BERT-base MRPC d₉₀ 1,608 by SAID and
1,861 by DID, QQP 8,030 and 9,295; "200 parameters" for RoBERTa-large on MRPC: SAID below DID.

Hypotheses, written before the run:
- small: d₉₀ by DID is at most 5,000, below 0.05% of what moves.
- said: d₉₀ by SAID is not above DID's.
Measured: experiments/results/intrinsic_dimension/README.md.

Limits (a review, after the runs): the reference is a full fine-tuning whose head shared its
learning rate and is under-trained, so d₉₀ is relative to that run and no property of the task. d =
5,000 was added to decide `small`, a sequential test.
"""

from ml_collections import ConfigDict

from .shared import SMOKE, WORDNET, config_of

DIMS = (100, 300, 1000, 3000, 5000, 10000)
SAID_DIMS = (1000, 3000)
RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# The fewer the groups, the larger they are, and the less of a step each parameter has.
RATES_OF_FEW = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FEW = 300
MORE_SEEDS = (1, 2)


def sweep_full_size(add):
    """DID and SAID by d at five rates, then two more seeds at the best."""
    for structure, dims in (("did", DIMS), ("said", SAID_DIMS)):
        for dim in dims:
            rates = RATES_OF_FEW if dim <= FEW else RATES
            tuned = {"tune": ("optimizer.lr", rates), "more_seeds": MORE_SEEDS}
            own = {"method.structure": structure, "method.dim": dim}
            add(f"{structure}-d{dim}", **tuned, **own)


def sweep_smoke(add):
    """A few of them, two rates and two seeds each."""
    for structure, dims in (("did", (20, 60)), ("said", (20, 60))):
        for dim in dims:
            tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
            own = {"method.structure": structure, "method.dim": dim}
            add(f"{structure}-d{dim}", **tuned, **SMOKE, **own)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    own = {
        "method.name": "intrinsic",
        "method.targets": "encoder/.*|head/.*",
        "method.dim": 1000,
        "method.structure": "did",
        "method.projection": "grouped",
        "optimizer.lr": 1e-2,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_norm": 0.0,
    }
    return config_of("intrinsic_dimension", arg, {"": {}, "smoke": SMOKE}, WORDNET, own)
