"""What an adapter of small rank cannot do: memorise random labels, learn new words for old ones

    make testbeds
    lora-jax sweep --config=rank_caps_movement --sweep=full_size --workdir=runs/caps
    python -m experiments.analysis rank_caps_movement runs/caps

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: MiniLM on two tasks made hard (`data/random_labels.py`). *labels*: 1,024 of WordNet's
glosses with labels drawn at random from 26, 8 epochs; the loss is on those glosses themselves, so
it is what was memorised (log 26 = 3.258 is nothing). q,v of all layers memorise as much at any
rank, so here they are those of the last layer only, with r = 1 of all layers, full fine-tuning and
the frozen probe. *words*: the glosses of `what_rank` (6,400 once), every word replaced
throughout by another about as common, so that the table of embeddings is wrong; test loss on other
glosses with the same replacement; q,v of all layers, full, and probe. Alpha 16; five rates each on
seed 0, the best on validation with four more seeds.

The source: "LoRA Without Regret" (Schulman et al. 2025) and Biderman et al. 2024: LoRA falls behind
full fine-tuning where what is to be learned exceeds its capacity, or lies far from pretraining;
Hu et al. 2021, Section 7.1 do not expect a small rank to do for every task (one in a language that
pretraining did not have, say).

Hypotheses, written before the sweep. Seen before, single runs: 512 random labels memorised to a
loss of 0.01 by r = 4 in all layers (16 epochs, rate 5e-3); 1,024 as here at rate 1e-2: probe 1.61,
last layer r = 1 (alpha 2) 0.81, r = 64 (alpha 128) 0.98.
- labels_rank: in the last layer r = 1 memorises less than r = 64, by more than 0.1 nats.
- labels_spread: r = 1 in all layers (9,216 parameters) memorises more than r = 64 in the last
  (98,304), by more than 0.1 nats: it is not the number of parameters.
- labels_full: r = 64 in the last layer memorises less than full fine-tuning, by more than 0.1 nats.
- words_rank: with exchanged words r = 1 is worse than r = 64 by more than 0.02 nats.
- words_full: with exchanged words r = 64 is worse than full fine-tuning by more than 0.02 nats (it
  was the better one by 0.069 with the words as they are: `what_rank`).
Measured: experiments/results/rank_caps_movement/README.md.

Limits (a review, after the runs): alpha is 16, so r = 1 has scale 16 and r = 64 scale 0.25. At
alpha = 2 and rate 1e-2 r = 1 reaches 0.814 on the labels (seed 0), not 1.07; the probe's best rate
is at the edge of its grid. `labels_spread` is about stability: at rates where both train, r = 1 in
all layers memorises more. The `words` arms contain collapsed seeds; more seeds at those rates would
not help.
"""

from ml_collections import ConfigDict

from .shared import LORA, WORDNET, config_of
from .shared import SMOKE as OF_WORDNET

LABELS = {
    "data.source": "wordnet-random-labels",
    "data.limit": 1024,
    "data.eval_limit": 1024,
    "train.num_epochs": 8.0,
    "train.eval_every_steps": 256,
}
WORDS = {"data.source": "wordnet-exchanged-words"}
LAST = {"method.targets": "encoder/layers/5/attention/(query|value)/kernel"}
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
FULL_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
MORE_SEEDS = (1, 2, 3, 4)
SMOKE = {**OF_WORDNET, "train.num_epochs": 1.0}


def arms():
    """`(task, name, own settings)`, in the order of the tables."""
    head, full = {"method.name": "head"}, {"method.name": "full"}
    yield "labels", "head", {**LABELS, **head}
    for rank in (1, 4, 16, 64):
        yield "labels", f"last-r{rank}", {**LABELS, **LAST, "method.rank": rank}
    yield "labels", "qv-r1", {**LABELS, "method.rank": 1}
    yield "labels", "full", {**LABELS, **full}
    yield "words", "head", {**WORDS, **head}
    for rank in (1, 8, 64):
        yield "words", f"qv-r{rank}", {**WORDS, "method.rank": rank}
    yield "words", "full", {**WORDS, **full}


def sweep_full_size(add):
    """Two tasks, ranks, the probe and full fine-tuning at five rates, then four more seeds."""
    for task, name, own in arms():
        rates = FULL_RATES if name == "full" else RATES
        add(f"{task}-{name}", tune=("optimizer.lr", rates), more_seeds=MORE_SEEDS, **own)


def sweep_smoke(add):
    """The same arms, two rates and two seeds each."""
    for task, name, own in arms():
        rates = (FULL_RATES if name == "full" else RATES)[1:3]
        own = {key: value for key, value in own.items() if not key.startswith("data.")}
        few = {"data.limit": 48 if task == "words" else 64}
        if name.startswith("last"):
            own["method.targets"] = own["method.targets"].replace("5", "1")
        if "method.rank" in own:
            own["method.rank"] = min(own["method.rank"], 32)  # the tiny model's full rank
        own = {**own, **SMOKE, **few}
        add(f"{task}-{name}", tune=("optimizer.lr", rates), more_seeds=(1,), **own)


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    sizes = {"": {}, "smoke": SMOKE}
    return config_of("rank_caps_movement", arg, sizes, WORDNET, LORA)
