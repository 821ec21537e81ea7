"""How much rank does generation from data take? SmolLM2 on E2E (Hu et al. 2021, Table 18)

    lora-jax sweep --config=what_rank_e2e --sweep=full_size --workdir=runs/e2e_rank
    python -m experiments.analysis what_rank_e2e runs/e2e_rank   # decodes 40 prompts per run

The argument is a size: none, or `smoke` (a tiny model on sentences made in code; sweep `smoke`, a
minute). The data are a folder with the E2E set's train.txt, valid.txt and test.txt at data.path.

Compared: SmolLM2-135M-Instruct (4-bit values expanded to float), 192 pairs of properties and
sentence: 48 steps of 4, alpha 32 as in the paper, no dropout, no label smoothing. q,v at r = 1, 4,
16, 64 and full fine-tuning, five rates each on seed 0, the best on validation (96 pairs) with four
more seeds. The loss is nats a token of the completion on 96 test pairs, which are of 16 prompts:
the intervals resample prompts. BLEU is sacrebleu's over all references of 40 of the 630 test
prompts, decoded greedily by seeds 0 to 2.

The source, Table 18 (GPT-2 medium, one epoch of 42,000 pairs, one run each): validation loss 1.23
at r = 1, 1.18 at 4, 1.16 from 16 to 512; BLEU from 68.7 to 70.4 without an order. Table 3: full
fine-tuning 68.2, LoRA 70.4.

Hypotheses, written before the run:
- one: r = 1 is worse than r = 4 by more than 0.01 nats a token (Table 18: by 0.05).
- flat: r = 4 and r = 64 are equivalent within 0.03 nats (90% interval; Table 18: 0.02 apart).
- full: r = 4 is not worse than full fine-tuning by more than 0.03 nats (one-sided 5%).
- bleu: the ranks' mean BLEU lie within 3 points of each other.
Measured: experiments/results/what_rank_e2e/README.md.

Limits (a review, after the runs): alpha is 32 at every rank, so r = 1 has scale 32 and r = 64 scale
0.5. `bleu` compares point estimates of three seeds over 40 prompts (standard error 1 to 7 points):
inconclusive. Intervals rest on 16 prompts.
"""

from ml_collections import ConfigDict

from .shared import E2E, TINY_PAIRS, config_of

RANKS = (1, 4, 16, 64)
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
MORE_SEEDS = (1, 2, 3, 4)
SMOKE = {
    **TINY_PAIRS,
    "model.name": "tiny-llama",
    "data.limit": 0,
    "train.eval_every_steps": 4,
}


def sweep_full_size(add):
    """Four ranks and full fine-tuning at five rates, then four more seeds at the best."""
    for rank in RANKS:
        tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": MORE_SEEDS}
        add(f"r{rank}", **tuned, **{"method.rank": rank})
    add(
        "full",
        tune=("optimizer.lr", FULL_RATES),
        more_seeds=MORE_SEEDS,
        **{"method.name": "full"},
    )


def sweep_smoke(add):
    """Ranks of the tiny model, two rates and two seeds each."""
    for rank in (1, 4, 8, 16):
        tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
        # Under the names of the full size, so that the page is made of the same arms.
        add(f"r{64 if rank == 16 else 16 if rank == 8 else rank}", **tuned, **SMOKE,
            **{"method.rank": rank})  # fmt: skip
    full = {"tune": ("optimizer.lr", FULL_RATES[1:3]), "more_seeds": (1,)}
    add("full", **full, **SMOKE, **{"method.name": "full"})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    own = {
        "model.name": "smollm2-135m",
        "data.max_length": 96,  # the longest has 89 tokens
        "data.buckets": (64, 80, 96),
        "data.batch_size": 4,
        "data.limit": 192,  # one epoch
        "data.eval_limit": 96,
        "optimizer.lr": 2e-3,
        "optimizer.warmup_ratio": 0.1,
        "train.num_epochs": 1.0,
        "train.eval_every_steps": 48,
        "train.eval_batch_size": 16,
        "train.log_every_steps": 8,
    }
    return config_of("what_rank_e2e", arg, {"": {}, "smoke": SMOKE}, E2E, own)
