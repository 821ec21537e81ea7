"""What rank does a task need, each at its own learning rate, and does full fine-tuning do better?

The hypotheses and their margins: `experiments/configs/what_rank.py`.
"""

from experiments.analysis import findings, hypotheses

MARGIN = 0.02
READ_WITH = (
    "Read with this: the head trains at its arm's rate, so that at full fine-tuning's best "
    "rate the new head learns far slower than at LoRA's, and part of that difference may be the "
    "head's. In 200 steps no gloss is seen twice: nothing is overfitted, and longer training may "
    "order the arms otherwise. The bars of the figure hold what makes glosses hard, which "
    "all arms share; the verdicts are of paired differences."
)


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    verdicts = []
    if {"qv-r64", "q-r64"} <= found.keys():  # not in the smoke sweep: a tiny model has no such rank
        verdicts = [
            hypotheses.equivalent(
                "flat", "q,v r = 64 equals r = 8", found["qv-r64"], found["qv-r8"], MARGIN
            ),
            hypotheses.worse(
                "low_rank", "q,v r = 1 is worse than r = 8", found["qv-r1"], found["qv-r8"], MARGIN
            ),
            hypotheses.worse(
                "q_alone",
                "q r = 64 is worse than q,v r = 1",
                found["q-r64"],
                found["qv-r1"],
                MARGIN,
            ),
            hypotheses.worse(
                "full", "q,v r = 64 is worse than full", found["qv-r64"], found["full"], MARGIN
            ),
        ]
    runs = [run for one in found.values() for run in one.all_runs]
    shown = findings.figure_file(_draw(found), out, "ranks", runs)
    findings.write_findings(
        out,
        title="What rank",
        name="what_rank",
        command="python -m experiments.analysis what_rank runs/what_rank",
        verdicts=verdicts,
        parts=[findings.arm_table(found), shown, READ_WITH],
        runs=runs,
    )


def _draw(found):
    """Test loss against rank, q,v and q; full fine-tuning and the probe as bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("head", "#8b8b8b"), ("full", "#d9661f")):
        loss = found[name].test_loss
        axes.axhline(loss.estimate, color=colour, label={"head": "frozen probe"}.get(name, name))
        axes.axhspan(loss.low, loss.high, color=colour, alpha=0.15, linewidth=0)
    for start, colour in (("qv-r", "#2f86c9"), ("q-r", "#159b78")):
        some = {int(n.removeprefix(start)): c for n, c in found.items() if n.startswith(start)}
        losses = [one.test_loss for one in some.values()]
        axes.errorbar(
            list(some),
            [loss.estimate for loss in losses],
            [
                [loss.estimate - loss.low for loss in losses],
                [loss.high - loss.estimate for loss in losses],
            ],
            fmt="o-",
            color=colour,
            capsize=3,
            label={"qv-r": "LoRA on q,v", "q-r": "LoRA on q"}[start],
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank")
    axes.set_ylabel("test loss (nats), mean over seeds, 95%")
    axes.legend()
    return figure
