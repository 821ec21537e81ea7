"""How much rank does generation from data take? SmolLM2 on E2E (Hu et al. 2021, Table 18)

The hypotheses and their margins: `experiments/configs/what_rank_e2e.py`.
"""

import dataclasses

import numpy as np

from experiments.analysis import findings, hypotheses, learned
from lora_jax.data import load_splits
from lora_jax.generate import Decoding
from lora_jax.generate.score import Questions, answer, score
from lora_jax.io import write_json
from lora_jax.train.evaluate_run import load_cell
from lora_jax.train.task import task_of

NUM_PROMPTS, NUM_DECODED_SEEDS, BLEU_MARGIN = 40, 3, 3.0


def write(workdir, out) -> None:
    """Reads the finished sweep, decodes prompts by its adapters, and writes what was found."""
    found = hypotheses.by_prompt(hypotheses.read_arms(workdir))
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
    lines = ["| arm | BLEU, seed by seed | mean |", "|---|---|---:|"]
    for name, values in bleu.items():
        lines.append(f"| {name} | {' '.join(f'{v:.1f}' for v in values)} | {means[name]:.1f} |")
    runs = [run for one in found.values() for run in one.all_runs]
    figure = findings.draw_arms(found, beside="full")
    findings.write_findings(
        out,
        title="What rank, on SmolLM2 and E2E",
        name="what_rank_e2e",
        command="python -m experiments.analysis what_rank_e2e runs/e2e_rank",
        verdicts=verdicts,
        parts=[
            findings.arm_table(found),
            findings.figure_file(figure, out, "ranks", runs),
            "\n".join(lines),
            "Accuracy is the share of right tokens. All texts of seed 0: texts.json.",
        ],
        runs=runs,
        extra={"bleu": bleu},
    )
    write_json(out / "texts.json", texts)


def _decode(found):
    """`{arm: BLEU of each seed}` with "base" first, and the texts of seed 0."""
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
    for name, arm in found.items():
        bleu[name] = []
        for run in arm.runs[:NUM_DECODED_SEEDS]:
            adapted = learned.adapted(run.folder)
            params = adapted.method.merge(adapted.trainable, adapted.frozen)
            value, texts = said(run.name, params)
            bleu[name].append(value)
            kept.setdefault(name, texts)
            learned.adapted.cache_clear()  # a run of full fine-tuning holds a model
    return bleu, kept
