"""Does any variant of LoRA beat LoRA, once each has its own learning rate?

    lora-jax sweep --config=variants --sweep=variants --workdir=runs/variants
    lora-jax report runs/variants

The argument names a variant: `lora`, `rslora`, `lora_plus`, `lora_fa`, `dora`, `pissa`, `vera`,
`lora_xs`; a size may follow: `dora,smoke`.

What is compared: MiniLM on movie reviews, query and value of all six layers, one epoch of 233 steps
(32 texts of at most 32 tokens), alpha 16, AdamW, linear decay, weight decay 0.01, no dropout; the
head trains too, at the same rate. Rank 8 for all that have two trained factors; VeRA and LoRA-XS
have so few parameters a rank that they take more, as their papers do (256 and 32).

Each variant's rate is the best of six on validation, a factor of about three apart, seed 0; then
two more seeds at it. A rate at the end of its grid would be no optimum: the report says so.

The sources claim gains for every one of them: rsLoRA (arXiv:2312.03732) at ranks above 8, LoRA+
(2402.12354) 1-2% and up to twice the speed, DoRA (2402.09353) 1-4 points on commonsense reasoning,
PiSSA (2404.02948) 5 points on GSM8K, each against LoRA at one shared rate. "Learning Rate Matters"
(2602.04998) tunes all of them and finds them within 1-2% of LoRA. Hypothesis, before the run: at
its tuned rate no variant is better than LoRA in test loss by more than 0.01 nats (the width of the
report's basins), and LoRA-FA, VeRA and LoRA-XS, with fewer parameters, are worse by less than 0.02.
Measured: experiments/results/variants/README.md.
"""

from ml_collections import ConfigDict

from lora_jax.settings import make_config

from .shared import REVIEWS, read_argument

# Ranks, and the middle of the rates: LoRA's is known from `reviews_minilm`, the others' are guesses
# from how their update compares with LoRA's; the grids reach a factor of 16 or more to either side.
VARIANTS = {
    "lora": {"method.rank": 8, "optimizer.lr": 2e-3},
    "rslora": {"method.rank": 8, "optimizer.lr": 1e-3},
    "lora_plus": {"method.rank": 8, "optimizer.lr": 5e-4},
    "lora_fa": {"method.rank": 8, "optimizer.lr": 5e-3},
    "dora": {"method.rank": 8, "optimizer.lr": 2e-3},
    "pissa": {"method.rank": 8, "optimizer.lr": 5e-4},
    "vera": {"method.rank": 256, "optimizer.lr": 1e-2},
    "lora_xs": {"method.rank": 32, "optimizer.lr": 5e-3},
}
RATES = {
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "rslora": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lora_plus": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lora_fa": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "dora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "pissa": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "vera": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lora_xs": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
MORE_SEEDS = (1, 2)

SIZES = {
    "": {},
    "smoke": {
        "model.name": "tiny-bert",
        "data.limit": 64,
        "train.num_steps": 4,
        "train.num_epochs": 0.0,
        "train.eval_every_steps": 2,
        "train.log_every_steps": 2,
    },
}


def sweep_variants(add):
    """Every variant at six rates, then two more seeds at the best."""
    for name, settings in VARIANTS.items():
        tuned = {"tune": ("optimizer.lr", RATES[name]), "more_seeds": MORE_SEEDS}
        settings = {key: value for key, value in settings.items() if key != "optimizer.lr"}
        add(name, **tuned, **{"method.name": name, **settings})


def sweep_smoke(add):
    """The same in two minutes, on a tiny model: two rates, one more seed."""
    for name in VARIANTS:
        tuned = {"tune": ("optimizer.lr", RATES[name][2:4]), "more_seeds": (1,)}
        smoke = {**SIZES["smoke"], "method.rank": 4}
        add(name, **tuned, **{"method.name": name, **smoke})


def get_config(arg: str = "lora") -> ConfigDict:
    """The config for `arg`: a variant, and perhaps a size: "dora,smoke"."""
    name, size = read_argument("variants", arg or "lora", "variant", VARIANTS, SIZES)
    own = {
        "method.name": name,  # of LoRA's settings VeRA has no alpha; PiSSA and LoRA-XS draw nothing
        "method.ratio": 16.0,  # LoRA+: b's rate over a's
        "method.projection_seed": 0,  # VeRA: its shared random factors
        "train.num_epochs": 1.0,
        "train.eval_every_steps": 117,  # twice
    }
    return make_config(REVIEWS, own, VARIANTS[name], SIZES[size])
