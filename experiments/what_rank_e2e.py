"""How much rank does it take to say what one is told? SmolLM2 on E2E (Hu et al. 2021, Table 18)

    lora-jax sweep --config=experiments/what_rank_e2e.py --sweep=full_size --workdir=runs/e2e_rank
    python -m experiments.what_rank_e2e runs/e2e_rank     # decodes 40 prompts by each of 12 runs

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

from experiments.shared import E2E, TINY_PAIRS, config_of

RANKS = (1, 4, 16, 64)
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
MORE_SEEDS = (1, 2, 3, 4)
NUM_PROMPTS, NUM_DECODED_SEEDS, BLEU_MARGIN = 40, 3, 3.0

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
        # Under the names of the full size, so that the page is made of the same contestants.
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


def write(workdir, out) -> None:
    """Reads the finished sweep, decodes prompts by its adapters, and writes what was found."""
    import numpy as np

    from experiments import findings, hypotheses
    from lora_jax.io import write_json

    found = hypotheses.by_prompt(hypotheses.read_contestants(workdir))
    bleu, texts = _decode(found)
    ranks = [name for name in found if name != "full"]
    means = {name: float(np.mean(bleu[name])) for name in bleu}
    spread = max(means[name] for name in ranks) - min(means[name] for name in ranks)
    r1, r4, r64, full = (found[name] for name in ("r1", "r4", "r64", "full"))
    verdicts = [
        hypotheses.worse("one", "r = 1 is worse than r = 4 by more than 0.01", r1, r4, 0.01),
        hypotheses.equivalent("flat", "r = 4 equals r = 64 within 0.03", r4, r64, 0.03),
        hypotheses.not_worse("full", "r = 4 is within 0.03 of full, or better", r4, full, 0.03),
        hypotheses.decide(
            "bleu",
            f"the ranks' mean BLEU lie within {BLEU_MARGIN:g} points",
            f"{spread:.1f} points apart",
            spread <= BLEU_MARGIN,
        ),
    ]
    lines = ["| contestant | BLEU, seed by seed | mean |", "|---|---|---:|"]
    for name, values in bleu.items():
        lines.append(f"| {name} | {' '.join(f'{v:.1f}' for v in values)} | {means[name]:.1f} |")
    runs = [run for one in found.values() for run in one.all_runs]
    figure = findings.draw_contestants(found, beside="full")
    findings.write_findings(
        out,
        title="What rank, on SmolLM2 and E2E",
        name="what_rank_e2e",
        command="python -m experiments.what_rank_e2e runs/e2e_rank",
        verdicts=verdicts,
        parts=[
            findings.contestant_table(found),
            findings.figure_file(figure, out, "ranks", runs),
            "\n".join(lines),
            "Accuracy is the share of right tokens. All texts of seed 0: texts.json.",
        ],
        runs=runs,
        extra={"bleu": bleu},
    )
    write_json(out / "texts.json", texts)


def _decode(found):
    """`{contestant: BLEU of each seed}` with "base" first, and the texts of seed 0."""
    import dataclasses

    from experiments import learned
    from lora_jax.data import load_splits
    from lora_jax.generate import Decoding
    from lora_jax.generate.score import Questions, answer, score
    from lora_jax.train.evaluate_run import load_cell
    from lora_jax.train.task import task_of

    config, one, _ = load_cell(next(iter(found.values())).runs[0].folder)
    data = dataclasses.replace(config.data, eval_limit=0)  # the prompts of all the test split
    whole = load_splits(data, target=task_of(config.model).target)
    questions = Questions.of(whole.test, NUM_PROMPTS)
    settings = Decoding(max_new_tokens=64)

    def said(name, params):
        texts = answer(one.model, params, questions.prompts, settings, batch_size=20)
        scores = score(questions, texts)
        print(f"{name}: BLEU {scores['bleu']:.1f}", flush=True)
        return scores["bleu"], texts

    value, base_texts = said("base", one.model.params)
    bleu, kept = {"base": [value]}, {"prompts": questions.prompts, "base": base_texts}
    for name, contestant in found.items():
        bleu[name] = []
        for run in contestant.runs[:NUM_DECODED_SEEDS]:
            adapted = learned.adapted(run.folder)
            params = adapted.method.merge(adapted.trainable, adapted.frozen)
            value, texts = said(run.name, params)
            bleu[name].append(value)
            kept.setdefault(name, texts)
            learned.adapted.cache_clear()  # a run of full fine-tuning holds a model
    return bleu, kept


if __name__ == "__main__":
    from experiments.findings import run_main

    run_main("what_rank_e2e", write)
