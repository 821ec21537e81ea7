"""Does a base in four bits cost anything? (QLoRA, Dettmers et al. 2023)

    make testbeds
    lora-jax sweep --config=qlora --sweep=full_size --workdir=runs/qlora
    python -m experiments.analysis qlora runs/qlora

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Compared: LoRA on all linear layers, r = 8, over the base in float32 and over the same base in NF4
with double quantisation (kernels of the layers only; dequantised to float32). MiniLM on WordNet's
glosses as in `what_rank` (200 steps of 32), SmolLM2-135M on E2E as in `what_rank_e2e` (48 steps of
4; its weights are 4-bit values already, of another format, so NF4 rounds what was rounded; its 96
test pairs are of 16 prompts, which its intervals resample). Five rates each on seed 0, the best on
validation with four more seeds.

The source: QLoRA (arXiv:2305.14314), Table 3 and Section 4: "16-bit, 8-bit and 4-bit adapter
methods replicate the performance of the fully finetuned 16-bit baseline": RoBERTa-large on GLUE,
BF16 LoRA 88.8, QLoRA Int8 88.8, FP4 88.6; MMLU with LLaMA 7B to 65B, BF16 53.0, NF4 with double
quantisation 53.1.

Hypotheses, written before the run, margin 0.02 nats of test loss:
- minilm: NF4 is equivalent to float32 (90% interval within the margin).
- smollm2: NF4 is equivalent to float32 (the same), in nats a token.
Measured: experiments/results/qlora/README.md.

Limits (a review, after the runs): both verdicts are inconclusive. SmolLM2's estimate equals the
margin, so no number of seeds decides it.
"""

from ml_collections import ConfigDict

from .shared import LORA, SMOKE, WORDNET, config_of

SMOLLM2 = {
    "model.name": "smollm2-135m",
    "model.head": "causal-lm",
    "model.scan_layers": True,
    "data.source": "e2e",
    "data.path": "../shared/data/e2e",
    "data.text": "prompt",
    "data.label": "completion",
    "data.max_length": 96,  # the longest has 89 tokens
    "data.buckets": (64, 80, 96),
    "data.batch_size": 4,
    "data.limit": 192,
    "data.eval_limit": 96,
    "method.train": "",
    "train.eval_every_steps": 48,
    "train.eval_batch_size": 16,
}
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
MORE_SEEDS = (1, 2, 3, 4)
SMOKE_SMOLLM2 = {
    "model.name": "tiny-llama",
    "data.source": "tiny-pairs",
    "data.path": "",
    "data.max_length": 96,
    "data.buckets": (96,),
    "data.limit": 0,
    "train.num_steps": 4,
    "train.eval_every_steps": 4,
}


def sweep_full_size(add):
    """Two models, two bases each, at five rates, then four more seeds at the best."""
    for model, own in (("minilm", {}), ("smollm2", SMOLLM2)):
        for base, kind in (("float32", ""), ("nf4", "nf4")):
            tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": MORE_SEEDS}
            add(f"{model}-{base}", **tuned, **{**own, "model.quantize": kind})


def sweep_smoke(add):
    """The same with tiny models, two rates and two seeds each."""
    for model, own in (("minilm", SMOKE), ("smollm2", {**SMOLLM2, **SMOKE_SMOLLM2})):
        for base, kind in (("float32", ""), ("nf4", "nf4")):
            tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
            add(f"{model}-{base}", **tuned, **{**own, "model.quantize": kind})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    own = {
        "model.head": "classification",
        "model.scan_layers": False,
        "model.quantize": "",
        "method.targets": "all-linear",
    }
    return config_of("qlora", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA, own)
