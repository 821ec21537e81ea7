"""Does any variant of LoRA beat LoRA, once each has its own learning rate?

    lora-jax sweep --config=experiments/variants.py --sweep=variants --workdir=runs/variants
    lora-jax report runs/variants

The argument names a variant: `lora`, `rslora`, `lora_plus`, `lora_fa`, `dora`, `pissa`, `vera`,
`lora_xs`; a size may follow: `dora,smoke`.

What is compared: MiniLM on movie reviews, query and value of all six layers, one epoch of 233 steps
(32 texts of at most 32 tokens), alpha 16, AdamW, linear decay, weight decay 0.01, no dropout; the
head trains beside, at the same rate. Rank 8 for all that have two trained factors; VeRA and LoRA-XS
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

from lora_jax import RequestError
from lora_jax.core.trees import nearest

# Ranks, and the middle of the rates: LoRA's is known from `reviews_minilm`, the others' are guesses
# from what their update is beside LoRA's; the grids reach a factor of 16 or more to either side.
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
    name, _, size = (arg or "lora").partition(",")
    if name not in VARIANTS:
        meant = f"; did you mean '{next(iter(VARIANTS))},{name}'?" if name in SIZES else ""
        raise RequestError(
            f"variants.py:{arg}: no variant {name!r}; {nearest(name, VARIANTS)}{meant}"
        )
    if size not in SIZES:
        raise RequestError(f"variants.py:{arg}: no size {size!r}; {nearest(size, SIZES)}")

    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.name = "minilm"
    config.model.num_labels = 2
    config.model.dtype = "float32"

    config.data = ConfigDict()
    config.data.source = "reviews"
    config.data.path = ""
    config.data.text = "text"
    config.data.label = "label"
    config.data.max_length = 32
    config.data.buckets = (16, 24, 32)
    config.data.batch_size = 32
    config.data.seed = 0
    config.data.limit = 0

    config.method = ConfigDict()
    config.method.name = name
    config.method.targets = "q,v"
    config.method.rank = 8
    config.method.alpha = 16.0  # VeRA has none
    config.method.dropout = 0.0
    config.method.init = "kaiming_uniform"  # of what is drawn: not VeRA, PiSSA, LoRA-XS
    config.method.ratio = 16.0  # LoRA+: b's rate over a's
    config.method.projection_seed = 0  # VeRA: its shared random factors
    config.method.train = "head/.*"

    config.optimizer = ConfigDict()
    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_ratio = 0.06
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.num_epochs = 1.0
    config.train.num_steps = 0
    config.train.label_smoothing = 0.0
    config.train.eval_every_steps = 117  # twice
    config.train.checkpoint_every_steps = 0
    config.train.patience = 0
    config.train.eval_batch_size = 128
    config.train.log_every_steps = 10

    config.update_from_flattened_dict(VARIANTS[name])
    config.update_from_flattened_dict(SIZES[size])
    return config
