"""Is performance flat in rank because each rank had its own learning rate? A question of our own.

    make testbeds
    lora-jax sweep --config=experiments/tuned_per_rank.py --sweep=full_size --workdir=runs/tuned
    python -m experiments.tuned_per_rank runs/tuned

The argument is a size: none, or `smoke` (a tiny model on 64 reviews; sweep `smoke`, a minute).

Papers compare ranks at one rate (Hu et al. 2021, Table 6) or at rates of their own (variants of
LoRA, "LoRA Without Regret"), and scale ΔW by alpha / r with alpha fixed, by alpha / r with alpha
= 2 r, or by alpha / √r. No one asked how much of "flat in rank" each of these choices makes.
Here: MiniLM, WordNet's glosses as in `what_rank`, q,v, r = 1, 4, 16, 64, three conventions that
agree at r = 8: alpha = 16 (scale 16 / r), alpha = 2 r (scale 2), rsLoRA with alpha = 2 √8 (scale
5.7 / √r); six rates each, seed 0 and the best with one more. For each convention: the spread over
ranks of the validation loss (largest less smallest) with rates tuned per rank, and at the one
rate that is best for the mean.

Hypotheses, written before the run (of `what_rank`, alpha = 16, seed 0 up to r = 8 had been seen:
5e-3 is best for all of them), margin 0.02 nats:
- fixed_alpha: with alpha = 16 one shared rate adds less than the margin to the spread.
- alpha_2r: with alpha = 2 r it adds more than the margin: there tuning per rank makes the
flatness.
- tuned_is_tuned: with rates tuned per rank the three conventions differ by less than the margin
at every rank, so that a convention is a choice of rates and no more.
Measured: experiments/results/tuned_per_rank/README.md.

Limits (a review, after the runs): all three verdicts compare point estimates of validation loss, of
the one or two seeds that also chose the rates, without an interval. On test, two seeds, r = 1
differs by 0.040 (seeds 0.059, 0.021) between the conventions, not 0.075. The head shared each arm's
learning rate.
"""

from ml_collections import ConfigDict

from experiments.shared import LORA, SMOKE, WORDNET, config_of

RANKS = (1, 4, 16, 64)
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
MARGIN = 0.02
CONVENTIONS = {
    "alpha16": lambda rank: {"method.alpha": 16.0},
    "alpha2r": lambda rank: {"method.alpha": 2.0 * rank},
    "rslora": lambda rank: {"method.name": "rslora", "method.alpha": 2.0 * 8**0.5},
}


def sweep_full_size(add):
    """Three conventions at four ranks and six rates, then one more seed at the best."""
    for name, of_rank in CONVENTIONS.items():
        for rank in RANKS:
            tuned = {"tune": ("optimizer.lr", RATES), "more_seeds": (1,)}
            add(f"{name}-r{rank}", **tuned, **{"method.rank": rank, **of_rank(rank)})


def sweep_smoke(add):
    """Two ranks, two rates and two seeds each."""
    for name, of_rank in CONVENTIONS.items():
        for rank in (1, 4):
            tuned = {"tune": ("optimizer.lr", RATES[1:3]), "more_seeds": (1,)}
            add(f"{name}-r{rank}", **tuned, **SMOKE, **{"method.rank": rank, **of_rank(rank)})


def get_config(arg: str = "") -> ConfigDict:
    """The config for `arg`: nothing, or "smoke"."""
    return config_of("tuned_per_rank", arg, {"": {}, "smoke": SMOKE}, WORDNET, LORA)


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    from experiments import findings, hypotheses

    found = hypotheses.read_contestants(workdir)
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
        command="python -m experiments.tuned_per_rank runs/tuned",
        verdicts=verdicts,
        parts=[
            findings.figure_file(_draw(by), out, "rates", runs),
            "Validation loss by rate, seed 0:",
            "\n".join(lines),
            findings.contestant_table(found),
        ],
        runs=runs,
    )


def _draw(by):
    """Validation loss against rate, a panel a convention, a line a rank."""
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


if __name__ == "__main__":
    from experiments.findings import run_main

    run_main("tuned_per_rank", write)
