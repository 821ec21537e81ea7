"""LoRA on MiniLM and movie reviews: how near to full fine-tuning, how far above a frozen probe?

    lora-jax train --config=reviews_minilm:lora --workdir=runs/reviews

The argument names the method, and with it the settings that suit it: `lora` (rank 8 on query and
value), `lora-all` (rank 8 on every linear layer), `full`, `bitfit`, `head` (the frozen probe). A
size may follow: `lora,smoke` takes four steps of a tiny model on 64 of the texts; `lora,demo` stops
after DEMO_STEPS steps, on texts cut at 24 tokens instead of 32.

Two sweeps of it:
    make demo                                                                   (about 6 minutes)
    lora-jax sweep --config=reviews_minilm --sweep=full_size --workdir=runs/full
`demo` is rank x targets, its eight LoRA cells in one program. `full_size` is the measured result:
each arm tuned over five learning rates on one seed, then four more seeds at the rate with
the best validation loss (54 cells, 2.5 hours on 2 cores); `lora-jax report runs/full` tabulates it.

The paper has no such experiment; its nearest is RoBERTa-base on SST-2 (Table 2): LoRA 95.1, full
94.8. One run in torch at T = 32, 2 epochs, without a validation split (8,516 training and 2,252
test snippets of other movies): accuracy 0.727 for the probe, 0.815 for LoRA r = 8 on all linears,
0.819 for full fine-tuning. Measured here: experiments/results/reviews_minilm/README.md.
"""

from ml_collections import ConfigDict

from lora_jax.settings import make_config

from .shared import REVIEWS, read_argument

# Settings that belong together: a method and its learning rate, tuned at ranks 1 and 8 (sweep
# `full_size`: the same rate for both). BitFit's is a guess: it is in no sweep.
METHODS = {
    "lora": {"method.name": "lora", "method.targets": "q,v", "optimizer.lr": 1e-3},
    "lora-all": {"method.name": "lora", "method.targets": "all-linear", "optimizer.lr": 5e-4},
    "full": {"method.name": "full", "optimizer.lr": 1e-4},
    "bitfit": {"method.name": "bitfit", "optimizer.lr": 1e-3},
    "head": {"method.name": "head", "optimizer.lr": 1e-2},
}

# What `full_size` compares.
ARMS = {
    "head": METHODS["head"],
    "lora-qv-r1": {**METHODS["lora"], "method.rank": 1},
    "lora-qv-r8": {**METHODS["lora"], "method.rank": 8},
    "lora-all-r1": {**METHODS["lora-all"], "method.rank": 1},
    "lora-all-r8": {**METHODS["lora-all"], "method.rank": 8},
    "full": METHODS["full"],
}
RATES = {
    "head": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    "lora": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "full": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
}
# Twice an epoch: the default, four times, costs a probe a third of its time.
FULL_SIZE = {"train.eval_every_steps": 116}
MORE_SEEDS = (1, 2, 3, 4)

DEMO_RANKS = (1, 2, 4, 8)
DEMO_STEPS = 80
SIZES = {
    "": {},
    "demo": {
        "data.max_length": 24,  # texts are cut shorter than at full size: a quarter less arithmetic
        "train.num_steps": DEMO_STEPS,
        "train.eval_every_steps": DEMO_STEPS,  # one evaluation: it is a third of the time
    },
    "smoke": {
        "model.name": "tiny-bert",
        "data.limit": 64,
        "train.num_steps": 4,
        "train.eval_every_steps": 2,
        "train.log_every_steps": 2,
    },
}


def sweep_demo(add):
    """Rank x targets, the frozen probe and full fine-tuning, at their tuned rates."""
    add("head", **METHODS["head"])
    for name, settings in (("lora-qv", METHODS["lora"]), ("lora-all", METHODS["lora-all"])):
        for rank in DEMO_RANKS:
            add(f"{name}-r{rank}", **{**settings, "method.rank": rank})
    add("full", **METHODS["full"])


def sweep_full_size(add):
    """Each arm tuned over log-spaced rates (factors of about two), then with more seeds."""
    for name, settings in ARMS.items():
        rates = RATES[settings["method.name"]]
        tuned = {"tune": ("optimizer.lr", rates), "more_seeds": MORE_SEEDS}
        add(name, **tuned, **settings, **FULL_SIZE)


def get_config(arg: str = "lora") -> ConfigDict:
    """The config for `arg`: a method, and perhaps a size: "lora-all,smoke"."""
    name, size = read_argument("reviews_minilm", arg or "lora", "method", METHODS, SIZES)
    return make_config(REVIEWS, {"train.num_epochs": 2.0}, METHODS[name], SIZES[size])
