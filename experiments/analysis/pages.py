"""A study's page: its table of arms, its verdicts, its figures, from the committed record."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import evidence
from experiments.analysis.evidence import Claim, Evidence, Verdict
from experiments.analysis.findings import COLOURS, RESULTS, draw_bar, figure_file, paragraph_of
from experiments.analysis.study import CARDS, Arm, Study
from lora_jax import RequestError
from lora_jax.io import write_json, write_text
from lora_jax.report.quantities import rate_text

NOTE = (
    "Intervals are Student's over seeds and test examples as crossed effects; differences are "
    "paired; how, and what the verdicts mean, is in `experiments/analysis/evidence.py`. Rates were "
    "chosen on validation, by seeds that are not reported."
)


def difference(first: Arm, second: Arm) -> Evidence:
    """Test loss of the first minus the second's, paired over the seeds that both have.

    Raises `RequestError` where they were tested on other examples, or share no seed.
    """
    one, other = _paired(first, second)
    return evidence.crossed(one - other)


def _paired(first: Arm, second: Arm) -> tuple[np.ndarray, np.ndarray]:
    common = [seed for seed in first.seeds if seed in second.seeds]
    if not common or first.losses.shape[1] != second.losses.shape[1]:
        raise RequestError(f"{first.name} and {second.name} share no seed, or no test examples")
    rows = [[arm.seeds.index(seed) for seed in common] for arm in (first, second)]
    return first.losses[rows[0]], second.losses[rows[1]]


def change_of_difference(after: tuple[Arm, Arm], before: tuple[Arm, Arm]) -> Evidence:
    """(after[0] - after[1]) - (before[0] - before[1]) in test loss, paired throughout."""
    (a, b), (c, d) = _paired(*after), _paired(*before)
    if a.shape != c.shape:
        raise RequestError("the four arms have different seeds; run them with the same")
    return evidence.crossed((a - b) - (c - d))


def spoilt_by(*arms: Arm) -> str:
    """Which collapsed or missing runs leave a verdict on these arms inconclusive, "" for none."""
    most = max(len(arm.seeds) for arm in arms)
    dead = [
        f"{arm.name}: seed {', '.join(map(str, arm.collapsed))} collapsed"
        for arm in arms
        if arm.collapsed
    ]
    short = [
        f"{arm.name}: {len(arm.seeds)} of {most} seeds" for arm in arms if len(arm.seeds) < most
    ]
    return "; ".join(dead + short)


def compare(claim: Claim, first: Arm, second: Arm) -> Verdict:
    """The verdict on a claim about the first's test loss minus the second's."""
    return evidence.decide(claim, difference(first, second), spoilt=spoilt_by(first, second))


def arm_table(arms: Sequence[Arm]) -> str:
    """Markdown: each arm at its rate, with what the choice rests on."""
    lines = [
        "| arm | adapter parameters | learning rate, the head's | validation loss at the next "
        "lower and higher rate, less its own | both choosing seeds agree | test loss, 95% | "
        "accuracy, % | seeds |",
        "|---|---:|---|---|---|---:|---:|---:|",
    ]
    for arm in arms:
        loss = evidence.crossed(arm.losses).interval()
        dead = f", {len(arm.collapsed)} collapsed" if arm.collapsed else ""
        lines.append(
            f"| {arm.name} | {arm.parameters:,} | {_rates(arm)} | {_neighbours(arm)} | "
            f"{_agreement(arm)} | {loss.estimate:.3f} [{loss.low:.3f}, {loss.high:.3f}] | "
            f"{100 * arm.right.mean():.1f} | {len(arm.seeds)}{dead} |"
        )
    return "\n".join(lines)


def _rates(arm: Arm) -> str:
    own = (row for row in arm.cells if row["point"] == list(arm.chosen))
    row = next(row for row in own if row["seed"] == arm.seeds[0] and not row["tuning"])
    body, head = rate_text(row["lr"]), row["head_lr"]
    edge = " (edge of the grid)" if arm.tuning is not None and arm.at_edge else ""
    return f"{body}, {rate_text(head) if head else 'the same'}{edge}"


def _neighbours(arm: Arm) -> str:
    """What the next smaller and larger first value cost on validation."""
    if arm.tuning is None:
        return ""
    means = dict(zip(arm.points, arm.tuning.mean(axis=1), strict=True))
    line = sorted(point for point in means if point[1:] == arm.chosen[1:])
    place = line.index(arm.chosen)
    costs = [
        f"{means[line[n]] - means[arm.chosen]:+.3f}" if 0 <= n < len(line) else "not tried"
        for n in (place - 1, place + 1)
    ]
    return ", ".join(costs)


def _agreement(arm: Arm) -> str:
    if not arm.choices or len(arm.choices) == 1:
        return ""
    if set(arm.choices) == {arm.chosen}:
        return "yes"
    shown = (", ".join(rate_text(x) for x in choice) for choice in arm.choices)
    return "no: " + "; ".join(shown)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: hypothesis, seen, verdict, p after Holm, and the power that was planned."""
    lines = [
        "| hypothesis | margin | seen | verdict | p, after Holm | power, planned |",
        "|---|---:|---|---|---:|---|",
    ]
    for v in verdicts:
        alone = v.verdict == evidence.HOLDS and v.holm >= 0.05
        note = f" ({v.note})" if v.note else " (not after Holm)" if alone else ""
        bound = f"±{v.margin:g}" if v.kind == "equivalent" else f"{v.margin:g}"
        power = "" if v.power is None else f"{v.power:.0%} at {v.expected:+g}"
        lines.append(
            f"| {v.name}: {v.claim} | {bound} | {v.seen} | **{v.verdict}**{note} | "
            f"{_p_text(v.p)}, {_p_text(v.holm)} | {power} |"
        )
    return "\n".join(lines)


def waiting(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> str:
    """Markdown that names the registered claims whose runs are not complete, "" for none."""
    decided = {verdict.name for verdict in verdicts}
    names = [claim.name for claim in claims if claim.name not in decided]
    return f"Registered, runs not complete: {', '.join(names)}." if names else ""


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def draw_arms(arms: Sequence[Arm], *, reference: Arm | None = None, title: str = ""):
    """Test losses with 95% intervals, seeds as dots; right, differences from `reference`."""
    from matplotlib.figure import Figure

    size = (9.5 if reference else 6.5, 1.2 + 0.36 * len(arms))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2 if reference else 1, sharey=True, squeeze=False)[0]
    places = np.arange(len(arms), 0, -1)
    for place, arm in zip(places, arms, strict=True):
        draw_bar(panels[0], place, evidence.crossed(arm.losses).interval())
        panels[0].plot(arm.losses.mean(axis=1), [place - 0.22] * len(arm.seeds), "k.", markersize=3)
        if reference is not None and arm.name != reference.name:
            draw_bar(panels[1], place, difference(arm, reference).interval())
    panels[0].set_yticks(places, [arm.name for arm in arms])
    panels[0].set_ylim(0.4, len(arms) + 0.6)
    panels[0].set_xlabel("test loss (nats), mean over seeds, 95%; dots: seeds")
    if reference is not None:
        panels[1].axvline(0, color=COLOURS[0])
        panels[1].set_xlabel(f"difference from {reference.name} (nats), paired, 95%")
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def draw_errors(axes, places, found: Sequence[Evidence], colour: str, label: str) -> None:
    """Estimates with their 95% intervals, joined by a line."""
    intervals = [one.interval() for one in found]
    middle = np.array([one.estimate for one in found])
    reach = [middle - [i.low for i in intervals], [i.high for i in intervals] - middle]
    axes.errorbar(places, middle, reach, fmt="o-", color=colour, capsize=3, label=label)


def save_figure(figure, out: Path, name: str, caption: str) -> str:
    """Writes `out`/NAME.png, white behind; returns the Markdown that shows it."""
    return figure_file(figure, out, name, caption=caption)


def write_page(
    out: str | Path,
    *,
    name: str,
    title: str,
    commands: Sequence[str],
    verdicts: Sequence[Verdict],
    parts: Sequence[str],
    study: Study | None = None,
    runs_of: str = "",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes verdicts.json and README.md of the experiment `name` into `out`.

    The runs are those of `study`, whose record is in `out`, or of the study named `runs_of`, whose
    committed record says which they were. `commands` made it, `parts` are Markdown after the
    verdicts, `extra` numbers that only figures show. Paragraphs of the docstring that begin with
    "Deviations" and "Limits" follow the verdicts.
    """
    out = Path(out)
    verdicts = evidence.with_holm(verdicts)
    facts = _facts(out if study is not None else RESULTS / runs_of)
    runs = f"The runs are those of [{runs_of}](../{runs_of}/README.md)"
    if study is not None:
        reported = sum(len(arm.seeds) for arm in study.arms.values())
        runs = f"{len(study.cells)} runs, {reported} of them reported"
    write_json(
        out / "verdicts.json",
        {"verdicts": [dataclasses.asdict(v) for v in verdicts], **facts, **(extra or {})},
    )
    run_on = ", ".join(commit[:12] for commit in facts["commits"])
    note = (
        f"{runs}; commit {run_on}, JAX {', '.join(facts['jax'])}. {NOTE} "
        f"`python -m experiments.recompute {name}` makes this page again from the files here."
    )
    said = (paragraph_of(name, start) for start in ("Deviations", "Limits"))
    text = [f"# {title}", note, "    " + "\n    ".join(commands), verdict_table(verdicts)]
    write_text(out / "README.md", "\n\n".join([*text, *filter(None, [*said, *parts])]) + "\n")


def _facts(out: Path) -> dict[str, list]:
    """Commits, devices and JAX versions of all runs, from their cards."""
    lines = gzip.decompress((out / CARDS).read_bytes()).decode().splitlines()
    cards = [json.loads(line) for line in lines]
    devices = sorted({json.dumps(card["device"], sort_keys=True) for card in cards})
    return {
        "commits": sorted({card["commit"] for card in cards}),
        "devices": [json.loads(device) for device in devices],
        "jax": sorted({card["versions"]["jax"] for card in cards}),
    }
