"""Which matrices, at an equal budget? And MLP against attention? (Hu et al. 2021, Table 5)

The hypotheses and their margins: `experiments/configs/which_matrices.py`.
"""

from experiments.analysis import findings, hypotheses

MARGIN = 0.02


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    compared = (
        ("spread", "q r = 8 is worse than all four r = 2", "q-r8", "qkvo-r2"),
        ("k_alone", "k r = 8 is worse than v r = 8", "k-r8", "v-r8"),
        ("value_or_pair", "v r = 8 is worse than q,v r = 4", "v-r8", "qv-r4"),
        ("mlp", "attention r = 5 is worse than the MLP r = 4", "attention-r5", "mlp-r4"),
    )
    verdicts = [
        hypotheses.worse(name, claim, found[first], found[second], MARGIN)
        for name, claim, first, second in compared
    ]
    pair = ("pair", "q,v r = 4 equals all four r = 2", found["qv-r4"], found["qkvo-r2"])
    verdicts.insert(2, hypotheses.equivalent(*pair, MARGIN))
    runs = [run for one in found.values() for run in one.all_runs]
    findings.write_findings(
        out,
        title="Which matrices",
        name="which_matrices",
        command="python -m experiments.analysis which_matrices runs/which",
        verdicts=verdicts,
        parts=[
            findings.arm_table(found),
            findings.figure_file(findings.draw_arms(found), out, "matrices", runs),
        ],
        runs=runs,
    )
