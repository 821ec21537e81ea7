"""Does the best learning rate depend on the rank? And how far is it from full fine-tuning's?

    python -m experiments.analysis lr_by_rank runs/what_rank     # reads the runs of what_rank

Compared: the six rates of each arm of `what_rank` (MiniLM, WordNet's glosses, 200 steps,
alpha 16 for all ranks, so that the scale falls as 1 / r), validation loss, seed 0.

The source: "LoRA Without Regret" (Schulman et al. 2025, thinkingmachines.ai): with scale alpha / r
the best rate moves by less than 2 from r = 4 to 512, and is 9.8 times full fine-tuning's (15 times
in short runs); small ranks fall off the curve once their capacity is used up.

Hypotheses, written before those runs were looked at:
- independent: the best rates of r = 2, 4, 8, 64 on q,v differ by at most a factor of 2.5, one step
  of the grid.
- tenfold: the best rate of r = 8 on q,v is 5 to 20 times full fine-tuning's.
- one_rate_for_all: at the one rate that is best for the mean over r = 1 … 64, no rank loses more
  than 0.02 nats of validation loss to its own best rate.
Each best rate is of one seed: a basin is narrower than the grid only where the curves say so.
Measured: experiments/results/lr_by_rank/README.md.

Limits (a review, after the runs): the grid has steps of 2 to 2.5, so it cannot measure factors as
small as those of the hypotheses: all ranks share the last rate before training collapses. The
tenfold rate is that of a tied head. `one_rate_for_all` follows from the grid.
"""

from experiments.analysis import findings, hypotheses

MARGIN = 0.02
STEP = 2.5


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    ranks = {
        int(name.removeprefix("qv-r")): one
        for name, one in found.items()
        if name.startswith("qv-r")
    }
    best = {rank: one.lr for rank, one in ranks.items()}
    spread = max(lr for r, lr in best.items() if r > 1) / min(lr for r, lr in best.items() if r > 1)
    ratio = best[8] / found["full"].lr
    rates = sorted(set.intersection(*(set(one.rates) for one in ranks.values())))
    shared = min(rates, key=lambda lr: sum(one.rates[lr] for one in ranks.values()))
    lost = {rank: one.rates[shared] - min(one.rates.values()) for rank, one in ranks.items()}
    edges = [name for name in (*(f"qv-r{r}" for r in ranks), "full") if found[name].at_edge]
    verdicts = [
        hypotheses.decide(
            "independent",
            "best rates of r = 2 … 64 within a factor of 2.5",
            f"{', '.join(f'r = {r}: {lr:g}' for r, lr in best.items())}; a factor of {spread:.3g}",
            spread <= STEP * 1.001,
        ),
        hypotheses.decide(
            "tenfold",
            "LoRA's best rate (r = 8) is 5 to 20 times full fine-tuning's",
            f"{best[8]:g} and {found['full'].lr:g}: {ratio:.3g} times",
            5 <= ratio <= 20,
        ),
        hypotheses.decide(
            "one_rate_for_all",
            f"one rate costs no rank more than {MARGIN} nats",
            f"at {shared:g}: " + ", ".join(f"r = {r} {loss:+.3f}" for r, loss in lost.items()),
            max(lost.values()) <= MARGIN,
        ),
    ]
    shown = {**{f"LoRA q,v r = {r}": one for r, one in ranks.items()}, "full": found["full"]}
    runs = [run for one in shown.values() for run in one.all_runs]
    lines = [
        "| arm | " + " | ".join("rate: loss" for _ in range(6)) + " |",
        "|---" * 7 + "|",
    ]
    for name, one in shown.items():
        cells = [f"{lr:g}: {loss:.3f}" for lr, loss in one.rates.items()]
        lines.append(f"| {name} | " + " | ".join([*cells, *[""] * (6 - len(cells))]) + " |")
    note = (
        f"At the edge of its grid, so perhaps no optimum: {', '.join(edges)}."
        if edges
        else "No best rate lies at the edge of its grid."
    )
    findings.write_findings(
        out,
        title="The learning rate by rank",
        name="lr_by_rank",
        command="python -m experiments.analysis lr_by_rank runs/what_rank",
        verdicts=verdicts,
        parts=[findings.figure_file(_draw(shown), out, "rates", runs), note, "\n".join(lines)],
        runs=runs,
    )


def _draw(shown):
    """Validation loss against rate, a line per rank; full fine-tuning dashed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, one) in enumerate(shown.items()):
        is_full = name == "full"
        colour = "#d9661f" if is_full else colormaps["viridis"](number / max(1, len(shown) - 1))
        axes.plot(
            list(one.rates),
            list(one.rates.values()),
            "s--" if is_full else "o-",
            color=colour,
            label="full fine-tuning" if is_full else name,
        )
    lowest = min(min(one.rates.values()) for one in shown.values())
    axes.set_ylim(lowest - 0.03, lowest + 0.8)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss (nats), seed 0")
    axes.legend(fontsize=8)
    return figure
