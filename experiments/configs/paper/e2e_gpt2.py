"""The paper's Tables 3 and 18: GPT-2 medium and large on E2E with LoRA.

    lora-jax train --config=paper/e2e_gpt2:gpt2-medium --workdir=runs/e2e_gpt2
    lora-jax sweep --config=paper/e2e_gpt2 --sweep=rank --workdir=runs/e2e_rank

The argument names the model, "gpt2-medium" or "gpt2-large"; "gpt2-medium,smoke" takes four steps of
a tiny GPT-2 on sentences made in code. `data.path` is a folder with train.txt, valid.txt and
test.txt; the default is next to the repository, from whose root the command is run.

What the paper found (three seeds): LoRA on medium BLEU 70.4±.1, NIST 8.85, METEOR 46.8, ROUGE-L
71.8, CIDEr 2.53, where full fine-tuning has BLEU 68.2; on large 70.4±.1, 8.89, 46.8, 72.0, 2.47
(full: 68.5). The "0.35M" and "0.77M" next to them are other methods' labels: rank 4 on query and
value is exactly 393,216 and 737,280 parameters. By rank on medium (Table 18, one run each):
validation loss 1.23 at 1, 1.18 at 4, 1.16 from 16 to 512; BLEU 68.7 to 70.4, best at 4.

Settings: Table 11 and the authors' code (microsoft/LoRA, c4593f0), which agree except for decoding.
AdamW, eps 1e-6, weight decay 0.01 on all that trains, no clipping, learning rate 2e-4, 500 steps of
warm-up and linear decay to 0 over 5 epochs of 8 pairs (26,290 steps), label smoothing 0.1, dropout
0.1 on the adapter's input, query and value of the fused c_attn (the aliases q and v are its
slices). a is drawn as the code draws it, U(±1/√in); the paper says "Gaussian" with no sigma.
Their pairs are padded to 512 tokens, here to a bucket: the mask makes that the same.

Different here: the weights of the best validation loss are kept, theirs are the last ones. Their
Adam adds eps before the bias correction, Optax after it.

Decoding: beams of 10, no n-gram of 4 twice, at most 64 tokens. The length penalty is 0.9 in Table
11 and 0.8 in the code's README; DECODING follows the paper. N-grams of the prompt may come again,
as in the code's gpt2_beam.py (transformers counts them). The README also ends at "\\n\\n" (628),
which no training text has; here only the end of text ends.

Measured here: not yet.
"""

from ml_collections import ConfigDict

from lora_jax.settings import make_config

from ..shared import E2E, TINY_PAIRS, read_argument

MODELS = ("gpt2-medium", "gpt2-large")
DECODING = {
    "num_beams": 10,
    "length_penalty": 0.9,
    "no_repeat_ngram_size": 4,
    "no_repeat_in_prompt": False,
    "max_new_tokens": 64,
}
SIZES = {
    "": {},
    "smoke": {
        **TINY_PAIRS,
        "model.name": "tiny-gpt2",
        "train.eval_every_steps": 2,
        "train.log_every_steps": 2,
        "optimizer.warmup_steps": 2,
    },
}


def sweep_seeds(add):
    """Three seeds, as the paper's means have."""
    for seed in range(3):
        add(f"s{seed}", seed=seed)


def sweep_rank(add):
    """Table 18's ranks, at one rate for all as there."""
    for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        add(f"r{rank}", **{"method.rank": rank})


def get_config(arg: str = "gpt2-medium") -> ConfigDict:
    """The config for `arg`: a model, and perhaps a size: "gpt2-large,smoke"."""
    name, size = read_argument("e2e_gpt2", arg or "gpt2-medium", "model", MODELS, SIZES)
    own = {
        "model.name": name,
        "data.max_length": 512,
        "data.buckets": (48, 64, 80, 128, 512),
        "data.batch_size": 8,
        "method.dropout": 0.1,
        "optimizer.lr": 2e-4,
        "optimizer.warmup_steps": 500,
        "optimizer.eps": 1e-6,
        "optimizer.clip_norm": 0.0,
        "train.num_epochs": 5.0,
        "train.label_smoothing": 0.1,
        "train.eval_every_steps": 2629,  # twice an epoch
        "train.eval_batch_size": 32,
        "train.log_every_steps": 100,
    }
    return make_config(E2E, own, SIZES[size])
