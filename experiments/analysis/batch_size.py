"""Does LoRA lose more than full fine-tuning when batches are large?

The hypotheses and their margins: `experiments/configs/batch_size.py`.
"""

from experiments.analysis import findings, hypotheses

MARGIN = 0.02


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    sizes = sorted({int(name.rpartition("-b")[2]) for name in found})
    small, large = sizes[0], sizes[-1]
    verdicts = []
    for name, claim in (("qv-r8", "gap_grows"), ("all-r32", "not_by_rank")):
        change = hypotheses.change_of_gap(
            (found[f"{name}-b{large}"], found[f"full-b{large}"]),
            (found[f"{name}-b{small}"], found[f"full-b{small}"]),
        )
        verdicts.append(
            hypotheses.beyond(
                claim,
                f"the gap of {name} to full grows from batch {small} to {large}",
                change,
                MARGIN,
            )
        )
    runs = [run for one in found.values() for run in one.all_runs]
    gaps = findings.gaps_by_number(found, "-b", beside="full")
    said = {"label": "batch size", "beside": "full"}
    figure = findings.draw_by_number(found, gaps, "-b", **said)
    findings.write_findings(
        out,
        title="Batch size",
        name="batch_size",
        command="python -m experiments.analysis batch_size runs/batch",
        verdicts=verdicts,
        parts=[
            findings.arm_table(found),
            findings.gap_table(gaps, **said),
            findings.figure_file(figure, out, "batches", runs),
        ],
        runs=runs,
    )
