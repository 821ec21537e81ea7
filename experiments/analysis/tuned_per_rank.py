"""Is performance flat in rank because each rank had its own learning rate? A question of our own.

The hypotheses and their margins: `experiments/configs/tuned_per_rank.py`.
"""

from experiments.analysis import findings, hypotheses
from experiments.configs.tuned_per_rank import CONVENTIONS, RATES

MARGIN = 0.02


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    by = {
        name: {int(n.rpartition("-r")[2]): c for n, c in found.items() if n.startswith(f"{name}-r")}
        for name in CONVENTIONS
    }
    tuned, shared, rates = {}, {}, {}
    for name, ranks in by.items():
        best = [min(one.rates.values()) for one in ranks.values()]
        tuned[name] = max(best) - min(best)
        rates[name] = min(
            RATES, key=lambda lr: sum(one.rates.get(lr, 1e9) for one in ranks.values())
        )
        losses = [one.rates[rates[name]] for one in ranks.values()]
        shared[name] = max(losses) - min(losses)
    apart = {
        rank: max(min(by[n][rank].rates.values()) for n in by)
        - min(min(by[n][rank].rates.values()) for n in by)
        for rank in next(iter(by.values()))
    }

    def added(name):
        text = f"at {rates[name]:g} the spread is {shared[name]:.3f}, tuned {tuned[name]:.3f}"
        return text, shared[name] - tuned[name]

    (text16, more16), (text2r, more2r) = added("alpha16"), added("alpha2r")
    verdicts = [
        hypotheses.decide("fixed_alpha", "one rate adds less than 0.02", text16, more16 < MARGIN),
        hypotheses.decide("alpha_2r", "one rate adds more than 0.02", text2r, more2r > MARGIN),
        hypotheses.decide(
            "tuned_is_tuned",
            "tuned, the conventions differ by less than 0.02 at every rank",
            ", ".join(f"r = {rank}: {value:.3f}" for rank, value in apart.items()),
            max(apart.values()) < MARGIN,
        ),
    ]
    lines = ["| convention, rank | " + " | ".join(f"{lr:g}" for lr in RATES) + " |"]
    lines.append("|---" * (len(RATES) + 1) + "|")
    for name, one in found.items():
        cells = [f"{one.rates[lr]:.3f}" if lr in one.rates else "" for lr in RATES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    runs = [run for one in found.values() for run in one.all_runs]
    findings.write_findings(
        out,
        title="Flat in rank because tuned per rank?",
        name="tuned_per_rank",
        command="python -m experiments.analysis tuned_per_rank runs/tuned",
        verdicts=verdicts,
        parts=[
            findings.figure_file(_draw(by), out, "rates", runs),
            "Validation loss by rate, seed 0:",
            "\n".join(lines),
            findings.arm_table(found),
        ],
        runs=runs,
    )


def _draw(by):
    """Validation loss against rate, a panel per convention, a line per rank."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(by), sharey=True)
    lowest = min(min(one.rates.values()) for ranks in by.values() for one in ranks.values())
    for axes, (name, ranks) in zip(panels, by.items(), strict=True):
        for n, (rank, one) in enumerate(ranks.items()):
            colour = colormaps["viridis"](n / max(1, len(ranks) - 1))
            axes.plot(
                list(one.rates), list(one.rates.values()), "o-", color=colour, label=f"r = {rank}"
            )
        axes.set_xscale("log")
        axes.set_title(name)
        axes.set_xlabel("peak learning rate")
        axes.set_ylim(lowest - 0.03, lowest + 0.6)
    panels[0].set_ylabel("validation loss (nats), seed 0")
    panels[0].legend(fontsize=8)
    return figure
