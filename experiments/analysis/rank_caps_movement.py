"""What an adapter of small rank cannot do: memorise random labels, learn new words for old ones

The hypotheses and their margins: `experiments/configs/rank_caps_movement.py`.
"""

from experiments.analysis import findings, hypotheses

LABELS_MARGIN, WORDS_MARGIN = 0.1, 0.02


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    last = "labels-last-r64"
    compared = (
        ("labels_rank", "last layer: r = 1 memorises less than 64", "labels-last-r1", last),
        ("labels_spread", "r = 64 there memorises less than r = 1 in all", last, "labels-qv-r1"),
        ("labels_full", "r = 64 there memorises less than full", last, "labels-full"),
        ("words_rank", "exchanged: r = 1 is worse than r = 64", "words-qv-r1", "words-qv-r64"),
        ("words_full", "exchanged: r = 64 is worse than full", "words-qv-r64", "words-full"),
    )
    verdicts = [
        hypotheses.worse(
            name,
            claim,
            found[first],
            found[second],
            LABELS_MARGIN if name.startswith("labels") else WORDS_MARGIN,
        )
        for name, claim, first, second in compared
    ]
    runs = [run for one in found.values() for run in one.all_runs]
    parts = []
    for task, text in (
        ("labels", "Random labels: the loss on what was trained on; log 26 = 3.258 is nothing."),
        ("words", "Exchanged words: the loss on test glosses."),
    ):
        own = {name: one for name, one in found.items() if name.startswith(f"{task}-")}
        figure = findings.draw_arms(own)
        parts += [
            f"## {text}",
            findings.arm_table(own),
            findings.figure_file(figure, out, task, runs),
        ]
    findings.write_findings(
        out,
        title="Where rank caps movement",
        name="rank_caps_movement",
        command="python -m experiments.analysis rank_caps_movement runs/caps",
        verdicts=verdicts,
        parts=parts,
        runs=runs,
    )
