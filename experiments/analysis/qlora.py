"""Does a base in four bits cost anything? (QLoRA, Dettmers et al. 2023)

The hypotheses and their margins: `experiments/configs/qlora.py`.
"""

from experiments.analysis import findings, hypotheses

MARGIN = 0.02


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    texts = {name: one for name, one in found.items() if name.startswith("smollm2")}
    found |= hypotheses.by_prompt(texts)
    verdicts = [
        hypotheses.equivalent(
            model,
            f"NF4 equals float32 within {MARGIN}",
            found[f"{model}-nf4"],
            found[f"{model}-float32"],
            MARGIN,
        )
        for model in ("minilm", "smollm2")
    ]
    runs = [run for one in found.values() for run in one.all_runs]
    parts = []
    for model in ("minilm", "smollm2"):
        own = {name: one for name, one in found.items() if name.startswith(model)}
        figure = findings.draw_arms(own, beside=f"{model}-float32")
        parts += [
            findings.arm_table(own),
            findings.figure_file(figure, out, model, runs),
        ]
    findings.write_findings(
        out,
        title="A base in four bits",
        name="qlora",
        command="python -m experiments.analysis qlora runs/qlora",
        verdicts=verdicts,
        parts=parts,
        runs=runs,
    )
