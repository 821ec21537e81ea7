"""Is LoRA better than full fine-tuning where examples are few? (Hu et al. 2021, Table 16)

The hypotheses and their margins: `experiments/configs/low_data.py`.
"""

from experiments.analysis import findings, hypotheses

MARGIN = 0.02


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    sizes = sorted({int(name.rpartition("-n")[2]) for name in found})
    few, many = sizes[0], sizes[-1]
    at = lambda name, size: found[f"{name}-n{size}"]  # noqa: E731
    verdicts = [
        hypotheses.worse(
            "few", f"at {few} full is worse than LoRA", at("full", few), at("qv-r8", few), MARGIN
        ),
        hypotheses.equivalent(
            "many", f"at {many} LoRA equals full", at("qv-r8", many), at("full", many), MARGIN
        ),
        hypotheses.not_worse(
            "probe",
            f"at {few} the probe is not worse than LoRA",
            at("head", few),
            at("qv-r8", few),
            MARGIN,
        ),
    ]
    runs = [run for one in found.values() for run in one.all_runs]
    gaps = findings.gaps_by_number(found, "-n", beside="full")
    said = {"label": "reviews to train on", "beside": "full"}
    figure = findings.draw_by_number(found, gaps, "-n", **said)
    findings.write_findings(
        out,
        title="Few examples",
        name="low_data",
        command="python -m experiments.analysis low_data runs/low",
        verdicts=verdicts,
        parts=[
            findings.arm_table(found),
            findings.gap_table(gaps, **said),
            findings.figure_file(figure, out, "sizes", runs),
        ],
        runs=runs,
    )
