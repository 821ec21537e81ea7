"""What an experiment leaves behind: its runs, verdicts, tables and figures.

An analysis reads finished runs, decides each hypothesis (`hypotheses`), and
writes `experiments/results/NAME`: `cells.jsonl` (a line per run, with the hashes of its card),
`verdicts.json`, figures, and a README made of them, so that no figure in it is typed by hand.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis.hypotheses import (
    Arm,
    Verdict,
    best_rate,
    difference,
    interval_text,
    read_arms,
)
from lora_jax import RequestError
from lora_jax.core import trees
from lora_jax.io import atomic_path, write_json, write_text
from lora_jax.report.quantities import rate_text
from lora_jax.report.runs import FinishedRun, Run, finished_runs
from lora_jax.report.statistics import Interval
from lora_jax.train.environment import device_description, git_commit
from lora_jax.train.environment import versions as package_versions

EXPERIMENTS = Path(__file__).parents[1]
RESULTS = EXPERIMENTS / "results"
# Pages of the first edition, and the study that asks their question again.
SUPERSEDED = {
    "what_rank": "what_rank_2",
    "tuned_per_rank": "what_rank_2",
    "forgetting": "what_rank_2",
    "what_rank_e2e": "what_rank_e2e_2",
    "batch_size": "batch_size_2",
    "low_data": "low_data_2",
    "subspace_ranks": "directions_2",
    "subspace_seeds": "directions_2",
    "delta_vs_weight": "delta_vs_weight_2",
}
COLOURS = ("#d9661f", "#2f86c9", "#159b78", "#8a5cc2", "#b8860b")


def cell_record(run: FinishedRun) -> dict[str, Any]:
    """What is committed of a run: one line, with the hashes that its card has."""
    card = run.card
    return {
        "cell": run.name,
        "method": run.config["method"]["name"],
        "targets": run.config["method"].get("targets"),
        "rank": run.config["method"].get("rank"),
        "lr": run.config["optimizer"]["lr"],
        "seed": run.config["seed"],
        "steps": card.metrics.steps,
        "adapter_parameters": card.counts.adapter,
        "validation_loss": card.metrics.validation.loss,
        "test_loss": card.metrics.test.loss,
        "test_accuracy": card.metrics.test.accuracy,
        "config_hash": card.config_hash,
        "base_hash": card.base_hash,
        "data_hash": card.data_hash,
        "commit": card.commit,
        "weights_sha256": card.metrics.weights_sha256,
    }


def seeds_of(place: str | Path, name: str) -> list[dict[str, Any]]:
    """`cell_record` of each seed of an arm at its rate: of a finished sweep's workdir, or of
    results that were kept, a folder with a cells.jsonl. Raises `RequestError`."""
    place = Path(place)
    if not (place / "cells.jsonl").is_file():
        found = read_arms(place)
        if name in found:
            return [cell_record(run) for run in found[name].runs]
        raise RequestError(f"{place} has no {name!r}; {trees.nearest(name, found)}")
    rows = [json.loads(line) for line in (place / "cells.jsonl").read_text().splitlines()]
    known = dict.fromkeys(row["cell"].rpartition("-lr")[0] for row in rows)
    own = [row for row in rows if row["cell"].rpartition("-lr")[0] == name]
    if not own:
        raise RequestError(f"{place} has no {name!r}; {trees.nearest(name, known)}")
    tried = {r["lr"]: r["validation_loss"] for r in own if r["seed"] == own[0]["seed"]}
    lr = best_rate(name, tried)
    return [row for row in own if row["lr"] == lr]


def arm_table(arms: Mapping[str, Arm]) -> str:
    """Markdown: each arm at its rate, with basin and interval."""
    lines = [
        "| arm | adapter parameters | rate | rates within 0.01 nats | test loss, 95% | "
        "accuracy, % | seeds |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for one in arms.values():
        near = [lr for lr, loss in one.rates.items() if loss <= min(one.rates.values()) + 0.01]
        basin = " ".join(map(rate_text, near)) + (" (edge of the grid)" if one.at_edge else "")
        loss = one.test_loss
        lines.append(
            f"| {one.name} | {one.runs[0].card.counts.adapter:,} | {rate_text(one.lr)} | "
            f"{basin} | {loss.estimate:.3f} [{loss.low:.3f}, {loss.high:.3f}] | "
            f"{100 * one.test_accuracy:.1f} | {len(one.runs)}"
            f"{f' ({one.num_failed} diverged)' if one.num_failed else ''} |"
        )
    return "\n".join(lines)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: hypothesis, seen, verdict."""
    lines = ["| hypothesis | seen | verdict |", "|---|---|---|"]
    lines += [f"| {v.name}: {v.claim} | {v.seen} | **{v.verdict}** |" for v in verdicts]
    return "\n".join(lines)


def draw_arms(arms: Mapping[str, Arm], *, beside: str = ""):
    """Test losses with their 95% intervals, a line per arm, single seeds as small marks.

    With `beside` the differences from that arm, paired, stand at the right: what makes
    examples hard is in the losses' intervals and not in theirs.
    """
    from matplotlib.figure import Figure

    size = (10 if beside else 7, 1.2 + 0.4 * len(arms))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True) if beside else [figure.subplots()]
    places = range(len(arms), 0, -1)
    for place, one in zip(places, arms.values(), strict=True):
        draw_bar(panels[0], place, one.test_loss)
        panels[0].plot(one.losses.mean(axis=1), [place - 0.2] * len(one.runs), "k.", markersize=4)
        if beside and one.name != beside:
            draw_bar(panels[1], place, difference(one, arms[beside]))
    panels[0].set_yticks(list(places), list(arms))
    panels[0].set_ylim(0.5, len(arms) + 0.5)
    panels[0].set_xlabel("test loss (nats), mean over seeds, 95%; dots: seeds")
    if beside:
        panels[1].axvline(0, color=COLOURS[0])
        panels[1].set_xlabel(f"difference from {beside} (nats), paired, 95%")
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
    return figure


def draw_bar(axes, place: float, found: Interval) -> None:
    """An interval as a thick line with its estimate as a dot."""
    axes.plot([found.low, found.high], [place, place], color=COLOURS[1], linewidth=3, alpha=0.5)
    axes.plot([found.estimate], [place], "o", color=COLOURS[1])


def gaps_by_number(
    arms: Mapping[str, Arm], mark: str, *, beside: str
) -> dict[str, dict[int, Interval]]:
    """`{method: {number: …}}` of arms named METHOD, `mark`, number: test loss less that of
    the method `beside` at the same number, paired, 95%."""
    found: dict[str, dict[int, Interval]] = {}
    for name, one in arms.items():
        method, _, number = name.rpartition(mark)
        if method != beside:
            other = arms[f"{beside}{mark}{number}"]
            if failed := one.num_failed + other.num_failed:
                print(f"{name}: {failed} seeds diverged, and are not in its gap")
            found.setdefault(method, {})[int(number)] = difference(one, other)
    return found


def gap_table(gaps: Mapping[str, Mapping[int, Interval]], *, label: str, beside: str) -> str:
    """Markdown of `gaps_by_number`, a row a number."""
    numbers = sorted(next(iter(gaps.values())))
    heads = [label, *(f"{method} − {beside}, 95%" for method in gaps)]
    lines = ["| " + " | ".join(heads) + " |", "|---:" * len(heads) + "|"]
    for number in numbers:
        shown = (interval_text(own[number]) for own in gaps.values())
        lines.append(f"| {number:,} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw_by_number(
    arms: Mapping[str, Arm],
    gaps: Mapping[str, Mapping[int, Interval]],
    mark: str,
    *,
    label: str,
    beside: str,
):
    """Left: test loss against the number in the arms' names, a line per method, single seeds
    as dots. Right: `gaps_by_number`; 0 is the line of the method `beside`."""
    from matplotlib.figure import Figure

    numbers = sorted(next(iter(gaps.values())))
    colours = dict(zip([beside, *gaps], itertools.cycle(COLOURS), strict=False))
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, colour in colours.items():
        losses = [arms[f"{method}{mark}{n}"].losses.mean(axis=1) for n in numbers]
        left.plot(numbers, [seeds.mean() for seeds in losses], "-", color=colour, label=method)
        for number, seeds in zip(numbers, losses, strict=True):
            left.plot([number] * len(seeds), seeds, ".", color=colour, markersize=5)
    for method, own in gaps.items():
        colour, some = colours[method], [own[number] for number in numbers]
        middle = [gap.estimate for gap in some]
        right.plot(numbers, middle, "o-", color=colour, label=f"{method} − {beside}")
        low, high = [gap.low for gap in some], [gap.high for gap in some]
        right.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    right.axhline(0, color=colours[beside])
    left.set_ylabel("test loss (nats); dots: seeds")
    right.set_ylabel("difference (nats), paired, 95%")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def figure_file(
    figure, out: Path, name: str, runs: Sequence[FinishedRun] = (), *, caption: str = ""
) -> str:
    """Writes `out`/NAME.png; returns Markdown that shows it, under `caption` or its name.

    Its metadata have the caption, or the hashes of the runs' cards. White behind, so that it reads
    on a dark page too.
    """
    out.mkdir(parents=True, exist_ok=True)
    hashes = " ".join(sorted({run.card.config_hash[:12] for run in runs}))
    with atomic_path(out / f"{name}.png") as temporary:
        figure.savefig(
            temporary, format="png", dpi=110, facecolor="white",
            metadata={"Software": "lora_jax", "Description": caption or f"config hashes: {hashes}"},
        )  # fmt: skip
    return f"![{caption or name}]({name}.png)"


def write_findings(
    out: str | Path,
    *,
    title: str,
    name: str,
    command: str,
    verdicts: Sequence[Verdict],
    parts: Sequence[str],
    runs: Sequence[Run],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes cells.jsonl, verdicts.json and README.md of an experiment; prints the verdicts.

    `name` is the experiment's: the limits in its docstring follow the verdicts. `parts` are
    Markdown, after them; `extra` are numbers that the README only shows in
    figures, kept in verdicts.json.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    finished = finished_runs(runs)
    records = [cell_record(run) for run in finished]
    if records:
        write_text(out / "cells.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        commits = sorted({record["commit"] for record in records})
        devices = sorted({json.dumps(run.card.device) for run in finished})
        versions = finished[0].card.versions
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
    parts = [verdict_table(verdicts), paragraph_of(name, "Limits"), *parts]
    head = [f"# {title}", edition_of(name), note]
    text = "\n\n".join([*head, f"    {command}", *filter(None, parts)])
    write_text(out / "README.md", text + "\n")
    for verdict in verdicts:
        print(f"{verdict.name}: {verdict.verdict}: {verdict.seen}")
    print(f"written: {out}")


def edition_of(name: str) -> str:
    """The line under the title of a page of the first edition."""
    by = SUPERSEDED.get(name)
    text = "**First edition**, before a review; read it with its limits."
    if by is None:
        return text
    if (RESULTS / by / "README.md").exists():
        return f"{text} Superseded by [{by}](../{by}/README.md)."
    return f"{text} To be superseded by `{by}`, whose runs are not complete."


def source_of(name: str) -> Path:
    """The file with an experiment's protocol: its config, or its analysis where it has none."""
    places = [EXPERIMENTS / folder / f"{name}.py" for folder in ("configs", "analysis")]
    return next(place for place in places if place.is_file())


def paragraph_of(name: str, start: str = "") -> str:
    """The first paragraph of an experiment's docstring that begins with `start`, on one line."""
    text = ast.get_docstring(ast.parse(source_of(name).read_text(encoding="utf-8"))) or ""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return next((part for part in paragraphs if part.startswith(start)), "")
