"""LoRA on SmolLM2-135M and the E2E restaurants: how much rank does it take to say what one is told?

    lora-jax train --config=experiments/e2e_smollm2.py --workdir=runs/e2e
    lora-jax train --config=experiments/e2e_smollm2.py:short --workdir=runs/e2e_short
    lora-jax sweep --config=experiments/e2e_smollm2.py --sweep=rank --workdir=runs/e2e_rank

A prompt is a list of properties ("name : Blue Spice | area : riverside"), its completion a sentence
that says them. The model comes in a package (SmolLM2-135M-Instruct, a GGUF file), the data from
data.path: a folder with train.txt, valid.txt and test.txt, `properties||sentence` a line; the
default is beside the repository, from whose root the command is run. `:smoke` takes four steps of a
tiny model on sentences made in code, `--sweep=smoke` two ranks of it.

One epoch is 5,258 steps of 8 pairs. LoRA of rank 4 and alpha 32 on query and value, dropout 0.1,
weight decay 0.01, label smoothing 0.1, 500 steps of warm-up and a linear decay are the paper's
settings for GPT-2 (Table 11); the rate is a guess, and `rank` tunes it for each rank on the
validation loss, then adds seeds.

The paper's twin of this is GPT-2 medium on E2E by rank (Table 18, one run each, one rate for all):
validation loss 1.23 nats a token at rank 1, 1.18 at 4, 1.16 from 16 to 512, BLEU between 68.7 and
70.4 without an order. Other tokens here, so only the shape of that is to be compared.

Measured here, `:short` (240 steps, one seed, 17 minutes of 2 cores, an hour where other work runs
beside): validation NLL 1.67 at 40 steps, 1.40 at 240; BLEU over 37 prompts 0 before, 65 after (54
where the prompt's 4-grams may not be said again); experiments/results/e2e_smollm2. The sweep has
not been run.
"""

from ml_collections import ConfigDict

from lora_jax import RequestError
from lora_jax.core.trees import nearest

RANKS = (1, 2, 4, 8, 64)
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
MORE_SEEDS = (1, 2)

SIZES = {
    "": {},
    # What half an hour on two cores allows.
    "short": {
        "data.eval_limit": 240,
        "train.num_steps": 240,
        "train.eval_every_steps": 40,
        "train.log_every_steps": 10,
        "optimizer.warmup_steps": 20,
    },
    "smoke": {
        "model.name": "tiny-llama",
        "data.source": "tiny-pairs",
        "data.path": "",
        "data.max_length": 96,
        "data.buckets": (96,),
        "train.num_steps": 4,
        "train.eval_every_steps": 2,
        "train.log_every_steps": 2,
        "optimizer.warmup_steps": 2,
    },
}


def sweep_rank(add):
    """Every rank at five rates, then two more seeds at the best."""
    for rank in RANKS:
        tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": MORE_SEEDS}
        add(f"r{rank}", **tuned, **{"method.rank": rank})


def sweep_smoke(add):
    """Two ranks of the smoke size."""
    for rank in (1, 4):
        add(f"r{rank}", **SIZES["smoke"], **{"method.rank": rank})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: a size, "" or "smoke"."""
    size = arg or ""
    if size not in SIZES:
        raise RequestError(f"e2e_smollm2.py:{arg}: no size {size!r}; {nearest(size, SIZES)}")

    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.name = "smollm2-135m"
    config.model.head = "causal-lm"
    config.model.dtype = "float32"
    config.model.scan_layers = True  # one layer is compiled, not each: seconds for minutes

    config.data = ConfigDict()
    config.data.source = "e2e"  # or jsonl, csv, tsv, parquet with the columns below
    config.data.path = "../shared/data/e2e"
    config.data.text = "prompt"
    config.data.label = "completion"
    config.data.max_length = 128  # the longest pair has 125 tokens
    config.data.buckets = (48, 64, 80, 128)
    config.data.batch_size = 8
    config.data.seed = 0
    config.data.limit = 0
    config.data.eval_limit = 0  # validation and test pairs, by whole prompts

    config.method = ConfigDict()
    config.method.name = "lora"
    config.method.targets = "q,v"
    config.method.rank = 4
    config.method.alpha = 32.0
    config.method.dropout = 0.1
    config.method.init = "kaiming_uniform"
    config.method.train = ""

    config.optimizer = ConfigDict()
    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_ratio = 0.0
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.num_epochs = 1.0
    config.train.num_steps = 0
    config.train.label_smoothing = 0.1
    config.train.eval_every_steps = 0
    config.train.checkpoint_every_steps = 0
    config.train.patience = 0
    config.train.eval_batch_size = 32
    config.train.log_every_steps = 50

    config.update_from_flattened_dict(SIZES[size])
    return config
