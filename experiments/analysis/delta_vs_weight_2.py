"""Does ΔW read what W holds, more than its null, and is full fine-tuning's ΔW another kind? (second
edition of delta_vs_weight)

Reads the runs of what_rank_2 with a common head rate: `qv-r8`, `qv-r64`, `qv-full` (q and v at full
rank) and `full`, ten seeds each.

Compared: ΔW and W of q and v in MiniLM's six layers. "Held" is ‖UᵀWV‖ in ΔW's first 8 or 64
directions over what random directions hold, ‖W‖ r / √(inputs · outputs): 1 for random U and V. It
is the inverse of the amplification over random.

Changed after a review of the first edition: the amplification ‖ΔW‖ / ‖UᵀWV‖ of a random ΔW falls as
1/r, so its fall with rank could not fail to be seen. Everything is now over its null. The arm
`qv-full` is new: it separates the rank of q and v from the other parameters that `full` trains. The
head has a rate of its own.

The source: Hu et al. 2021, Table 7 (GPT-3, q of layer 48, r = 4): ΔW's directions hold 0.32, random
ones 0.02, W's own first four 21.67: 16 times random. Biderman et al. 2024 (arXiv:2405.09673): full
fine-tuning's ΔW needs 10 to 100 times LoRA's ranks for 90% of its energy. Shuttleworth et al. 2024
(arXiv:2410.21228): LoRA makes intruder dimensions, full fine-tuning hardly any.

Seen before: the first edition (five seeds, tied head, other rates). Held over random: r = 4: 1.2;
r = 64: 1.05; full's first 4 directions: 2.3, its first 64: 1.3. ΔW's directions held 4% of what
W's own first four hold. 90% of the energy: LoRA 2 directions, full 61 (31 to 107 by matrix).
‖ΔW‖: r = 4: 9.6, r = 64: 8.1, full 1.6. Intruders of 10: r = 4: 1.6, r = 64: 1.0, full 0. So
`more_than_random`, `far_from_the_source`, `not_the_top`, `moves_further` and `intruders` repeat
what was seen, on new runs; nothing was seen of q and v at full rank. The code was tried on smoke
runs (a tiny model, 4 steps), whose figures say nothing about these.

Hypotheses, written before these runs exist. Figures are means over the twelve matrices, with
Student's interval over seeds:
- more_than_random: r = 8's directions hold more than 1.1 times what random ones hold.
- far_from_the_source: they hold less than 4 times (the source: 16).
- not_the_top: they hold less than half of what W's own first 8 hold.
- less_at_64: r = 8's 8 directions hold more over random than r = 64's 64, by more than 0.05.
- full_holds_more: q and v at full rank hold more over random in their first 8 directions than
  r = 8, by more than 0.25.
- full_is_wide: 90% of the energy of q and v at full rank needs more than 64 of 384 directions.
- wider_than_lora: it needs more than 16 directions more than r = 64's.
- place_keeps_width: `full` needs as many as q and v at full rank, within 16 (90% interval).
- moves_further: r = 64 moves q and v more than 2 times as far as full rank does (‖ΔW‖).
- intruders: r = 8 has more intruders of 10 than q and v at full rank, by more than 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import learned, pages, study
from experiments.analysis.evidence import Claim, Verdict, decide, jackknife, mean_of_pairs
from lora_jax import RequestError
from lora_jax.analysis import (
    amplification,
    energy_rank,
    entropy_rank,
    intruder_dimensions,
    kernel_svd,
    stable_rank,
)
from lora_jax.io import write_json

DIRECTIONS = (8, 64)
LORA = ("qv-r8", "qv-r64")
FULL = ("qv-full", "full")
# What the tables show, of the first directions and of the whole ΔW.
PARTS = ("held", "of_top", "factor", "over_random")
WHOLE = ("delta_norm", "stable_rank", "entropy_rank", "energy_rank", "intruders")
Folders = Mapping[int, Path]


def measure(
    arms: Mapping[str, Folders], *, directions: tuple[int, int] = DIRECTIONS
) -> dict[str, Any]:
    """All that the tables, figures and hypotheses need, of `{"qv-r8": {seed: folder}, …}`.

    Returns plain numbers and lists, as in the JSON: `matrices`, `directions`, and `arms`, `{name:
    {"seeds", "delta_norm", "stable_rank", "entropy_rank", "energy_rank", "intruders", and for
    "first_few" and "first_many" directions {"held", "of_top", "factor", "over_random"}}}` with
    `(seeds, matrices)` each. `held` is ‖UᵀWV‖ over what random directions hold, `of_top` over what
    W's own first ones hold. An arm whose rank is below the number has no "first_many".

    Raises:
      RequestError: an arm is missing, arms of different seeds, a folder without adapter, or
        `qv-full` trained what `full` did.
    """
    if missing := [name for name in (*LORA, *FULL) if name not in arms]:
        raise RequestError(f"there is no arm {missing[0]}; give {', '.join((*LORA, *FULL))}")
    seeds = sorted(arms[LORA[0]])
    if odd := [name for name in arms if sorted(arms[name]) != seeds]:
        raise RequestError(f"{odd[0]} has the seeds {sorted(arms[odd[0]])}, {LORA[0]} {seeds}")
    first = learned.factors_at(arms[LORA[0]][seeds[0]])
    paths = list(first)
    base = learned.kernels_at(arms[LORA[0]][seeds[0]], paths)
    kernels = np.stack([base[path] for path in paths])
    found: dict[str, Any] = {}
    for name in (*LORA, *FULL):
        rows = []
        for seed in seeds:
            folder = arms[name][seed]
            if name in FULL:
                deltas, rank = learned.full_deltas_at(folder, paths), min(kernels.shape[1:])
            else:
                factors = learned.factors_at(folder)
                deltas = {path: x.scale * x.a @ x.b for path, x in factors.items()}
                rank = factors[paths[0]].rank
            rows.append(_row(np.stack([deltas[p] for p in paths]), kernels, rank, directions))
        found[name] = {"seeds": seeds, **_columns(rows)}
    if found["full"]["delta_norm"] == found["qv-full"]["delta_norm"]:
        raise RequestError("qv-full and full have one ΔW; train q and v alone for qv-full")
    return {"matrices": paths, "directions": list(directions), "arms": found}


def _row(deltas: np.ndarray, kernels: np.ndarray, rank: int, directions) -> dict[str, Any]:
    """Of one run, `(matrices,)` each."""
    s = kernel_svd(deltas).s
    row: dict[str, Any] = {
        "delta_norm": np.linalg.norm(deltas, axis=(1, 2)),
        "stable_rank": stable_rank(s),
        "entropy_rank": entropy_rank(s),
        "energy_rank": energy_rank(s),
        "intruders": intruder_dimensions(kernels, kernels + deltas).count,
    }
    for name, number in zip(("first_few", "first_many"), directions, strict=True):
        if number <= rank:
            one = amplification(deltas, kernels, number)
            row[name] = {
                "held": one.from_delta / one.expected,
                "of_top": one.from_delta / one.from_kernel,
                "factor": one.factor,
                "over_random": one.over_random,
            }
    return row


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`(seeds, matrices)` lists of the rows of one arm."""
    return {
        name: _columns([row[name] for row in rows])
        if isinstance(rows[0][name], dict)
        else [np.asarray(row[name], np.float64).tolist() for row in rows]
        for name in rows[0]
    }


def write(workdir, out) -> None:
    """Measures the runs of what_rank_2's sweeps, keeps the numbers, and makes the page."""
    save(measure(study.folders_of(workdir, (*LORA, *FULL))), Path(out))
    page(out)


def page(out) -> None:
    """The page, from the numbers that were kept in `out`."""
    data = read(out)
    shown = pages.save_figure(figure(data), Path(out), "held", "What ΔW's directions hold of W")
    pages.write_page(
        out, name="delta_vs_weight_2", title="ΔW against W and its null",
        commands=["python -m experiments.analysis delta_vs_weight_2 runs/what_rank_2"],
        runs_of="what_rank_2", verdicts=verdicts(data), parts=[shown, *tables(data)],
    )  # fmt: skip


def save(data: Mapping[str, Any], out: Path) -> None:
    """Writes what `measure` returned to `out`/delta_vs_weight.json."""
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "delta_vs_weight.json", data)


def read(out: Path) -> dict[str, Any]:
    """What `save` wrote: the page can be made again without the adapters."""
    return study.read_numbers(Path(out) / "delta_vs_weight.json")


def _by_seed(data: Mapping[str, Any], arm: str, *names: str) -> np.ndarray:
    """`(seeds,)`: the mean over matrices of one quantity."""
    found = data["arms"][arm]
    for name in names:
        found = found[name]
    return np.mean(found, axis=1)


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    """The verdict on each hypothesis of this file."""
    seeds = data["arms"][LORA[0]]["seeds"]
    few = {arm: _by_seed(data, arm, "first_few", "held") for arm in LORA + FULL}
    many = _by_seed(data, "qv-r64", "first_many", "held")
    top = _by_seed(data, "qv-r8", "first_few", "of_top")
    energy = {arm: _by_seed(data, arm, "energy_rank") for arm in LORA + FULL}
    norm = {arm: _by_seed(data, arm, "delta_norm") for arm in LORA + FULL}
    intruders = {arm: _by_seed(data, arm, "intruders") for arm in LORA + FULL}
    rows = (
        ("more_than_random", "r = 8's directions hold more than 1.1 times what random ones do",
         few["qv-r8"], 1.1, "times", "above"),
        ("far_from_the_source", "they hold less than 4 times (the source: 16)",
         few["qv-r8"], 4.0, "times", "below"),
        ("not_the_top", "they hold less than half of what W's own first 8 hold",
         top, 0.5, "", "below"),
        ("less_at_64", "r = 8's directions hold more over random than r = 64's, by more than 0.05",
         few["qv-r8"] - many, 0.05, "times", "above"),
        ("full_holds_more", "full rank's first 8 hold more over random than r = 8's, by over 0.25",
         few["qv-full"] - few["qv-r8"], 0.25, "times", "above"),
        ("full_is_wide", "90% of full rank's energy needs more than 64 of 384 directions",
         energy["qv-full"], 64.0, "directions", "above"),
        ("wider_than_lora", "it needs more than 16 directions more than r = 64's",
         energy["qv-full"] - energy["qv-r64"], 16.0, "directions", "above"),
        ("place_keeps_width", "full needs as many as full rank on q and v, within 16",
         energy["full"] - energy["qv-full"], 16.0, "directions", "equivalent"),
        ("moves_further", "r = 64 moves q and v more than 2 times as far as full rank",
         norm["qv-r64"] / norm["qv-full"], 2.0, "times", "above"),
        ("intruders", "r = 8 has more intruders of 10 than full rank, by more than 0.5",
         intruders["qv-r8"] - intruders["qv-full"], 0.5, "directions", "above"),
    )  # fmt: skip
    itself = [(seed, seed) for seed in seeds]
    return [
        decide(Claim(name, claim, kind, margin, unit), jackknife(mean_of_pairs(x, itself), seeds))
        for name, claim, x, margin, unit, kind in rows
    ]


def tables(data: Mapping[str, Any]) -> list[str]:
    """Two Markdown tables with 95% intervals over seeds: ΔW against W, and spectra."""
    lines = [
        "| ΔW of | directions | held over random | over W's own first | amplification | "
        "over random |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    more = [
        "| ΔW of | ‖ΔW‖ | stable rank | entropy rank | 90% of energy | intruders of 10 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in LORA + FULL:
        arm = data["arms"][name]
        for part, number in zip(("first_few", "first_many"), data["directions"], strict=True):
            if part in arm:
                cells = [_cell(data, name, part, q) for q in PARTS]
                lines.append(f"| {name} | {number} | " + " | ".join(cells) + " |")
        more.append(f"| {name} | " + " | ".join(_cell(data, name, q) for q in WHOLE) + " |")
    return ["\n".join(lines), "\n".join(more)]


def _cell(data: Mapping[str, Any], arm: str, *names: str) -> str:
    seeds = data["arms"][arm]["seeds"]
    values = _by_seed(data, arm, *names)
    found = jackknife(mean_of_pairs(values, [(s, s) for s in seeds]), seeds).interval()
    digits = max(0, 2 - math.floor(math.log10(abs(found.estimate)))) if found.estimate else 2
    form = f".{min(digits, 3)}f"
    return f"{found.estimate:{form}} [{found.low:{form}}, {found.high:{form}}]"


def figure(data: Mapping[str, Any]):
    """What ΔW's first directions hold over random, by matrix, a line per arm with its seeds."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8.4, 3.2), layout="constrained")
    all_axes = canvas.subplots(1, 2, sharey=True)
    colours = dict(zip((*LORA, *FULL), ("#2f86c9", "#d9661f", "#159b78", "#8a5cc2"), strict=True))
    for axes, part, number in zip(
        all_axes, ("first_few", "first_many"), data["directions"], strict=True
    ):
        for name in LORA + FULL:
            arm = data["arms"][name]
            if part in arm:
                held = np.asarray(arm[part]["held"])
                places = np.arange(held.shape[1])
                axes.plot(places, held.mean(axis=0), "o-", color=colours[name], label=name)
                axes.plot(places, held.T, ".", color=colours[name], alpha=0.25, markersize=3)
        axes.axhline(1.0, color="k", linestyle=":", label="random directions")
        short = [learned.short(path).removeprefix("layer ") for path in data["matrices"]]
        axes.set_xticks(np.arange(len(short)), short, rotation=90, fontsize=7)
        axes.set_title(f"‖UᵀWV‖ over random, first {number} directions", fontsize=9)
        axes.set_yscale("log")
    all_axes[0].legend(fontsize=8)
    return canvas
