"""What the experiments share: reading a finished sweep, verdicts on hypotheses, what is committed.

An experiment's `main` reads its runs, decides each hypothesis of its docstring by an interval, and
writes `experiments/results/NAME`: `cells.jsonl` (a line a run, with the hashes of its card),
`verdicts.json`, figures, and a README made of them, so that no figure in it is typed by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.formats.atomic import write_json, write_text
from lora_jax.report.quantities import rate_text
from lora_jax.report.runs import Run, read_runs
from lora_jax.report.statistics import Interval, mean_interval, paired_difference
from lora_jax.train.card import device_description, git_commit
from lora_jax.train.card import versions as package_versions

RESULTS = Path(__file__).parent / "results"
HOLDS, REFUTED, OPEN = "holds", "does not hold", "open"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One contestant of a sweep: its runs at the rate with the best validation loss, by seed.

    `rates` is `{rate: validation loss}` on the seed that all rates ran with; inf: diverged.
    `num_failed` are the seeds at the chosen rate that diverged: a verdict on them stays open.
    """

    name: str
    rates: Mapping[float, float]
    lr: float
    runs: tuple[Run, ...]
    all_runs: tuple[Run, ...]
    num_failed: int = 0

    @property
    def losses(self) -> np.ndarray:
        """Test losses `(seeds, examples)`, examples by index."""
        return np.stack([run.predictions.loss for run in self.runs])

    @property
    def test_loss(self) -> Interval:
        """Mean test loss with its 95% interval over seeds and examples."""
        return mean_interval(self.losses, seed=0)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds of `runs`."""
        return tuple(run.config["seed"] for run in self.runs)

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the smallest or largest tried."""
        return len(self.rates) > 1 and self.lr in (min(self.rates), max(self.rates))

    def mean(self, metric: str) -> float:
        """Mean over seeds of a number of the cards: "metrics.test.accuracy"."""
        return float(np.mean([run.metric(metric) for run in self.runs]))


def read_contestants(workdir: str | Path) -> dict[str, Contestant]:
    """The contestants of a sweep whose cells are named NAME-lrRATE-sSEED, in the sweep's order.

    Raises `RequestError` for cells of other names, or a sweep that has not ended.
    """
    named: dict[str, list[Run]] = {}
    runs, place = read_runs(workdir), Path(workdir) / "sweep.json"
    if not place.is_file():
        raise RequestError(f"{workdir} has no sweep.json; give the --workdir of a sweep")
    sweep = json.loads(place.read_text())
    order, there = sweep["cells"], {run.name for run in runs}
    if missing := [name for name in order if name not in there]:
        why = sweep.get("refused", {}).get(missing[0], "it has not begun; run the sweep to its end")
        raise RequestError(f"{workdir}: there is no {missing[0]}: {why}")
    known = {name: number for number, name in enumerate(order)}
    for run in sorted(runs, key=lambda run: known.get(run.name, len(known))):
        name, mark, _ = run.name.rpartition("-lr")
        if not mark:
            raise RequestError(f"{workdir}: cell {run.name!r} is of no tuned contestant")
        failed = run.folder / "failure.json"
        if not run.finished and not failed.exists():
            raise RequestError(f"{workdir}: {run.name} has not ended; run the sweep to its end")
        named.setdefault(name, []).append(run)
    found = {name: _contestant(name, some) for name, some in named.items()}
    counts = {name: len(one.runs) + one.num_failed for name, one in found.items()}
    if len(set(counts.values())) > 1:
        fewest = min(counts, key=counts.get)
        raise RequestError(
            f"{workdir}: {fewest} has {counts[fewest]} seeds at its best rate, others "
            f"{max(counts.values())}; run the sweep to its end"
        )
    return found


def _contestant(name: str, runs: list[Run]) -> Contestant:
    seed = runs[0].config["seed"]
    first = {r.config["optimizer"]["lr"]: r for r in runs if r.config["seed"] == seed}
    rates = {lr: _validation_loss(run) for lr, run in sorted(first.items())}
    lr = min(rates, key=rates.get)
    if rates[lr] == math.inf:
        raise RequestError(f"{name} diverged at every rate; tune it over smaller ones")
    chosen = [run for run in runs if run.config["optimizer"]["lr"] == lr]
    own = [run for run in chosen if run.finished]
    own.sort(key=lambda run: run.config["seed"])
    tried = [run for run in runs if run.finished and run.config["seed"] == seed]
    more = (run for run in own if run not in tried)
    failed = len(chosen) - len(own)
    return Contestant(name, rates, lr, tuple(own), (*tried, *more), failed)


def _validation_loss(run: Run) -> float:
    loss = run.metric("metrics.validation.loss") if run.finished else math.inf
    return loss if math.isfinite(loss) else math.inf


def difference(first: Contestant, second: Contestant, *, level: float = 0.95) -> Interval:
    """Test loss of the first minus the second's, paired over examples and, where they share them,
    seeds: the wider of the bootstrap's interval, which is too narrow with few seeds, and Student's.
    """
    bootstrap = paired_difference(
        first.losses,
        second.losses,
        first_index=first.runs[0].predictions.index,
        second_index=second.runs[0].predictions.index,
        first_seeds=first.seeds,
        second_seeds=second.seeds,
        seed=0,
        level=level,
    )
    if first.seeds != second.seeds:
        return bootstrap
    return _hull(bootstrap, _student(first.losses - second.losses, level))


def _student(rows: np.ndarray, level: float) -> Interval:
    """The mean of `rows (seeds, examples)` with an interval from the spread of both.

    Variances of the means over seeds and over examples add up (a crossed design); degrees of
    freedom by Welch and Satterthwaite. Nearly right from three seeds on; with one, examples alone.
    """
    from scipy.stats import t

    num_seeds, num_examples = rows.shape
    parts = [(np.var(rows.mean(axis=0), ddof=1) / num_examples, num_examples - 1)]
    if num_seeds > 1:
        parts.append((np.var(rows.mean(axis=1), ddof=1) / num_seeds, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    mean = float(rows.mean())
    if not variance:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    reach = float(t.ppf((1 + level) / 2, freedom) * math.sqrt(variance))
    return Interval(mean, mean - reach, mean + reach)


def mean_of(rows: np.ndarray) -> Interval:
    """The mean of `rows (seeds, examples)` with the wider of the bootstrap's 95% and Student's."""
    return _hull(mean_interval(rows, seed=0), _student(rows, 0.95))


def _hull(one: Interval, other: Interval) -> Interval:
    return Interval(one.estimate, min(one.low, other.low), max(one.high, other.high))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A hypothesis, what was seen, and whether it holds."""

    name: str
    claim: str
    seen: str
    verdict: str


def _interval_text(one: Interval, level: float, form: str = "+.3f") -> str:
    return f"{one.estimate:{form}} [{one.low:{form}}, {one.high:{form}}] ({level:.0%})"


def worse(name: str, claim: str, first: Contestant, second: Contestant, margin: float) -> Verdict:
    """Whether the first's test loss is above the second's by more than the margin.

    It holds where the 95% interval lies above the margin, not where it lies below, else open.
    """
    return _open_if_failed(beyond(name, claim, difference(first, second), margin), first, second)


def equivalent(
    name: str, claim: str, first: Contestant, second: Contestant, margin: float
) -> Verdict:
    """Whether two test losses are the same within the margin: two one-sided tests at 5%.

    It holds where the 90% interval lies within ±margin, not where it lies beyond, else open.
    """
    found = difference(first, second, level=0.90)
    inside = -margin < found.low and found.high < margin
    outside = found.low > margin or found.high < -margin
    verdict = HOLDS if inside else REFUTED if outside else OPEN
    text = _interval_text(found, 0.90)
    return _open_if_failed(Verdict(name, claim, text, verdict), first, second)


def not_worse(
    name: str, claim: str, first: Contestant, second: Contestant, margin: float
) -> Verdict:
    """Whether the first's test loss is not above the second's by more than the margin: a one-sided
    test at 5%.
    """
    found = difference(first, second, level=0.90)
    verdict = HOLDS if found.high < margin else REFUTED if found.low > margin else OPEN
    text = _interval_text(found, 0.90)
    return _open_if_failed(Verdict(name, claim, text, verdict), first, second)


def _open_if_failed(verdict: Verdict, *contestants: Contestant) -> Verdict:
    """What is left when unstable seeds drop out says nothing sure."""
    if not any(one.num_failed for one in contestants):
        return verdict
    failed = ", ".join(f"{one.num_failed} of {one.name}" for one in contestants if one.num_failed)
    return dataclasses.replace(
        verdict, verdict=OPEN, seen=f"{verdict.seen}; seeds that diverged: {failed}"
    )


def change_of_gap(
    after: tuple[Contestant, Contestant], before: tuple[Contestant, Contestant]
) -> Interval:
    """(after[0] - after[1]) - (before[0] - before[1]) in test loss, paired throughout."""
    rows = [after[0], after[1], before[0], before[1]]
    if len({one.seeds for one in rows}) > 1:
        raise RequestError("the four contestants have different seeds; run them with the same")
    first, second, third, fourth = (one.losses for one in rows)
    return mean_of((first - second) - (third - fourth))


def beyond(name: str, claim: str, found: Interval, margin: float) -> Verdict:
    """Whether a 95% interval lies above the margin, below it, or holds it."""
    verdict = HOLDS if found.low > margin else REFUTED if found.high < margin else OPEN
    return Verdict(name, claim, _interval_text(found, 0.95), verdict)


def decide(name: str, claim: str, seen: str, holds: bool | None) -> Verdict:
    """A verdict on what has no interval of its own; None: open."""
    return Verdict(name, claim, seen, OPEN if holds is None else HOLDS if holds else REFUTED)


def cell_record(run: Run) -> dict[str, Any]:
    """What is committed of a run: one line, with the hashes that its card has."""
    card = run.card
    return {
        "cell": run.name,
        "method": run.config["method"]["name"],
        "targets": run.config["method"].get("targets"),
        "rank": run.config["method"].get("rank"),
        "lr": run.config["optimizer"]["lr"],
        "seed": run.config["seed"],
        "steps": card["metrics"]["steps"],
        "adapter_parameters": card["counts"]["adapter"],
        "validation_loss": run.metric("metrics.validation.loss"),
        "test_loss": run.metric("metrics.test.loss"),
        "test_accuracy": run.metric("metrics.test.accuracy"),
        "config_hash": card["config_hash"],
        "base_hash": card["base_hash"],
        "data_hash": card["data_hash"],
        "commit": card["commit"],
        "weights_sha256": card["metrics"].get("weights_sha256"),
    }


def contestant_table(contestants: Mapping[str, Contestant]) -> str:
    """Markdown: each contestant at its rate, with basin and interval."""
    lines = [
        "| contestant | adapter parameters | rate | rates within 0.01 nats | test loss, 95% | "
        "accuracy, % | seeds |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for one in contestants.values():
        near = [lr for lr, loss in one.rates.items() if loss <= min(one.rates.values()) + 0.01]
        basin = " ".join(map(rate_text, near)) + (" (edge of the grid)" if one.at_edge else "")
        loss = one.test_loss
        lines.append(
            f"| {one.name} | {one.runs[0].card['counts']['adapter']:,} | {rate_text(one.lr)} | "
            f"{basin} | {loss.estimate:.3f} [{loss.low:.3f}, {loss.high:.3f}] | "
            f"{100 * one.mean('metrics.test.accuracy'):.1f} | {len(one.runs)}"
            f"{f' ({one.num_failed} diverged)' if one.num_failed else ''} |"
        )
    return "\n".join(lines)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: hypothesis, seen, verdict."""
    lines = ["| hypothesis | seen | verdict |", "|---|---|---|"]
    lines += [f"| {v.name}: {v.claim} | {v.seen} | **{v.verdict}** |" for v in verdicts]
    return "\n".join(lines)


def draw_contestants(contestants: Mapping[str, Contestant]):
    """Test losses with their 95% intervals, a line a contestant, single seeds as small marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(contestants)), layout="constrained")
    axes = figure.subplots()
    places = range(len(contestants), 0, -1)
    for place, one in zip(places, contestants.values(), strict=True):
        loss = one.test_loss
        axes.plot([loss.low, loss.high], [place, place], color="#2f86c9", linewidth=3, alpha=0.5)
        axes.plot(one.losses.mean(axis=1), [place - 0.2] * len(one.runs), "k.", markersize=4)
        axes.plot([loss.estimate], [place], "o", color="#2f86c9")
    axes.set_yticks(list(places), list(contestants))
    axes.set_xlabel("test loss (nats), mean over seeds, 95%; dots: seeds")
    axes.grid(axis="x", alpha=0.3)
    return figure


def figure_file(figure, out: Path, name: str, runs: Sequence[Run] = ()) -> str:
    """Writes `out`/NAME.png with the cards' hashes in its metadata; returns Markdown that shows it.

    White behind, so that it reads on a dark page too.
    """
    from lora_jax.formats.atomic import atomic_path

    out.mkdir(parents=True, exist_ok=True)
    hashes = " ".join(sorted({run.card["config_hash"][:12] for run in runs}))
    with atomic_path(out / f"{name}.png") as temporary:
        figure.savefig(
            temporary, format="png", dpi=110, facecolor="white",
            metadata={"Software": "lora_jax", "Description": f"config hashes: {hashes}"},
        )  # fmt: skip
    return f"![{name}]({name}.png)"


def write_findings(
    out: str | Path,
    *,
    title: str,
    command: str,
    verdicts: Sequence[Verdict],
    parts: Sequence[str],
    runs: Sequence[Run],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes cells.jsonl, verdicts.json and README.md of an experiment; prints the verdicts.

    `parts` are Markdown, after the verdicts; `extra` are numbers that the README only shows in
    figures, kept in verdicts.json.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    records = [cell_record(run) for run in runs if run.finished]
    if records:
        write_text(out / "cells.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        commits = sorted({record["commit"] for record in records})
        devices = sorted({json.dumps(run.card["device"]) for run in runs if run.finished})
        versions = next(run.card["versions"] for run in runs if run.finished)
    else:  # of an experiment that keeps no cards: here and now
        commits, devices = [git_commit()], [json.dumps(device_description())]
        versions = package_versions()
    found = {
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "commits": commits,
        "devices": [json.loads(device) for device in devices],
        "versions": versions,
        **(extra or {}),
    }
    write_json(out / "verdicts.json", found)
    run_on = ", ".join(commit[:12] for commit in commits)
    note = f"Commit {run_on}, JAX {versions.get('jax', '?')}; made by the command below."
    if records:
        note = (
            f"{len(records)} runs, a line each in cells.jsonl. Intervals are bootstrapped over "
            "seeds and examples; those of differences are paired, and where Student's is wider "
            f"(few seeds) it is that. {note}"
        )
    text = "\n\n".join(
        [f"# {title}", note, f"    {command}", verdict_table(verdicts), *filter(None, parts)]
    )
    write_text(out / "README.md", text + "\n")
    for verdict in verdicts:
        print(f"{verdict.name}: {verdict.verdict}: {verdict.seen}")
    print(f"written: {out}")


def run_main(
    name: str,
    write: Callable[..., None],
    argv: Sequence[str] | None = None,
    *,
    beside: bool = False,
) -> None:
    """The command line of an experiment: where its runs are, where its findings go.

    With `beside` it needs another sweep's runs, too: `write(workdir, out, beside)`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}")
    parser.add_argument("workdir", type=Path, help="a finished sweep's --workdir")
    parser.add_argument("--out", type=Path, default=RESULTS / name, help="(default: %(default)s)")
    if beside:
        parser.add_argument(
            "--beside", type=Path, required=True, help="the other sweep's --workdir"
        )
    options = parser.parse_args(argv)
    more = (options.beside,) if beside else ()
    try:
        write(options.workdir, options.out, *more)
    except RequestError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
