"""How many directions do two seeds, and two ranks, learn in common? (second edition of
subspace_seeds and subspace_ranks)

Reads the runs of what_rank_2 with a common head rate: `qv-r8` and `qv-r64`, ten seeds each.

Compared: ΔW's singular directions of inputs in q and v of MiniLM's six layers. A seed draws `a`,
the head, and which glosses are seen. `lora_jax.analysis.shared_directions` counts directions:
principal angles against random spaces, at 1%. Counts are of all 64 directions (a shared one is
visible above a cos² of 0.58) and of the first 8 of each (above 0.11). Marginal gains show where in
the order shared directions are.

The shared start: `a` of r = 8 begins with the first eight columns of r = 64's of the same seed. It
is taken out in two ways, for pairs of one seed and of different seeds alike:
- without the start: the space of r = 8's initial `a` is removed from both adapters' `a`, and what
  is left is compared in 376 dimensions. Columns that begin alike and see the same batches may still
  have taken the same path.
- other columns: r = 8 is compared with r = 64's columns 9 to 64 alone, which have a start of their
  own. This takes out the start and the path. A seed's glosses and head are still shared.

Changed after a review of the first edition: its count was the largest k with φ(k, k) above random
plus 0.05. φ(k, k) is cumulative, so one shared direction counted as 15. Its "23 to 46" are
withdrawn.

The source: Hu et al. 2021, Section 7.2. ΔW of q has more directions in common between two seeds
than ΔW of v (Figure 4); the top direction of r = 8 and of r = 64 overlaps with φ > 0.5, the others
little (Figure 3).

Seen before: the first edition (five seeds, tied head, other rates). In excess of random its seeds
shared 0.6 to 1.8 directions of the first 8 and 0.8 to 2.3 of 64, more in v than in q. φ(1, 1) of
r = 8 and r = 64 was 0.125 across seeds and 0.58 within a seed. So `few`, `some_of_the_first`,
`more_in_v` and `top_differs` repeat what was seen, on new runs; `q_more` of the source is the
opposite of `more_in_v`. No count by principal angles has been made on these runs or the first
edition's. Smoke runs (a tiny model, rank 4 and 8, 4 steps, 3 seeds) shared 3.6 of 4 directions
within a seed without the start, 0 across seeds: hence `same_path`.

Hypotheses, written before these runs exist. Figures are means over pairs and matrices, with a
jackknife over seeds:
- some: seeds share more than 0.5 of r = 64's 64 directions.
- few: they share fewer than 4.
- some_of_the_first: of their first 8 they share more than 0.5.
- more_in_v: they share more directions in v than in q (first 8; margin 0).
- top_differs: φ(1, 1) of r = 8 and r = 64 is below 0.5 across seeds.
- ranks_share: r = 8 and r = 64 of different seeds share more than 0.5 directions.
- start_is_most: within a seed r = 8 shares more than 3 directions more with r = 64 than with its
  other columns.
- same_path: within a seed they share, without the start, more than 0.5 directions more than r = 8
  shares with the other columns.
- nothing_left: with the other columns, r = 8 shares as many directions within a seed as across
  seeds, within 0.5 (90% interval). More than that is what the same glosses and head do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import learned, pages, study
from experiments.analysis.evidence import Claim, Verdict, decide, jackknife, mean_of_pairs
from lora_jax import RequestError
from lora_jax.analysis import (
    basis_similarity,
    delta_svd,
    expected_similarity,
    marginal_similarity,
    remove_directions,
    shared_directions,
)
from lora_jax.io import write_json

FEW = 8
# As they are, without the start, and with r = 64's other columns.
ENDS = ("", "_outside", "_others")
Folders = Mapping[int, Path]


def measure(arms: Mapping[str, Folders], *, few: int = FEW) -> dict[str, Any]:
    """All that the tables, figures and hypotheses need, of `{"qv-r8": {seed: folder}, "qv-r64":
    …}`.

    Returns plain numbers and lists, as in the JSON: `matrices`, `width`, `ranks`, `few`, and
    - `seeds`: `pairs (P, 2)` of r = 64; `count`, `count_few`, `count_output (P, matrices)`;
      `phi_first`, `phi_few`, `phi_all` likewise; `gains (matrices, r)`, means over pairs; `above`
      and `above_few`, the cos² that a shared direction must exceed.
    - `ranks_across` and `ranks_within`: `pairs` (r = 8's seed, r = 64's); `count` with the start,
      `count_outside` without, `count_others` with r = 64's other columns; `phi_first`,
      `phi_first_outside`, `phi_first_others` likewise, `(P, matrices)` each.

    Raises:
      RequestError: seeds of the arms that differ, fewer than three, or a folder without adapter.
    """
    narrow, wide = arms["qv-r8"], arms["qv-r64"]
    seeds = sorted(wide)
    if sorted(narrow) != seeds or len(seeds) < 3:
        raise RequestError(f"seeds are {sorted(narrow)} and {seeds}; give the same, at least three")
    of_narrow = {seed: learned.factors_at(narrow[seed]) for seed in seeds}
    of_wide = {seed: learned.factors_at(wide[seed]) for seed in seeds}
    starts = {seed: learned.starts_at(narrow[seed]) for seed in seeds}
    paths = list(of_wide[seeds[0]])
    one = of_wide[seeds[0]][paths[0]]
    across = [pair for pair in itertools.product(seeds, seeds) if pair[0] != pair[1]]
    ranks = [of_narrow[seeds[0]][paths[0]].rank, one.rank]
    return {
        "matrices": paths,
        "width": one.shape[0],
        "ranks": ranks,
        "few": few,
        "seeds": _between_seeds(of_wide, paths, seeds, few),
        "ranks_across": _between_ranks(of_narrow, of_wide, starts, paths, across),
        "ranks_within": _between_ranks(of_narrow, of_wide, starts, paths, [(s, s) for s in seeds]),
    }


def _between_seeds(factors, paths, seeds, few: int) -> dict[str, Any]:
    pairs = list(itertools.combinations(seeds, 2))
    svds = {s: {p: delta_svd(x.a, x.b, x.scale) for p, x in factors[s].items()} for s in seeds}
    bases = {s: {p: np.asarray(svds[s][p].basis("input")) for p in paths} for s in seeds}
    outputs = {s: {p: np.asarray(svds[s][p].basis("output")) for p in paths} for s in seeds}
    found: dict[str, list[list[Any]]] = {
        name: [[] for _ in pairs]
        for name in ("count", "count_few", "count_output", "phi_first", "phi_few", "phi_all")
    }
    gains = np.zeros((len(paths), min(b.shape[1] for b in bases[seeds[0]].values())))
    above, above_few = 1.0, 1.0
    for row, (m, n) in enumerate(pairs):
        for column, path in enumerate(paths):
            u1, u2 = bases[m][path], bases[n][path]
            phi = np.asarray(basis_similarity(u1, u2))
            whole = shared_directions(u1, u2)
            first = shared_directions(u1[:, :few], u2[:, :few])
            output = shared_directions(outputs[m][path], outputs[n][path])
            above, above_few = float(whole.thresholds[0]), float(first.thresholds[0])
            gains[column] += np.asarray(marginal_similarity(phi)) / len(pairs)
            for name, value in (
                ("count", int(whole.count)),
                ("count_few", int(first.count)),
                ("count_output", int(output.count)),
                ("phi_first", float(phi[0, 0])),
                ("phi_few", float(phi[few - 1, few - 1])),
                ("phi_all", float(phi[-1, -1])),
            ):
                found[name][row].append(value)
    return {
        "pairs": [list(pair) for pair in pairs],
        **found,
        "gains": gains.tolist(),
        "above": above,
        "above_few": above_few,
    }


def _between_ranks(of_narrow, of_wide, starts, paths, pairs) -> dict[str, Any]:
    """Counts of r = 8 of one seed and r = 64 of another or the same: as they are, without r = 8's
    start, and with those columns of r = 64 that r = 8 has not."""
    found: dict[str, list[list[Any]]] = {
        f"{name}{end}": [[] for _ in pairs] for name in ("count", "phi_first") for end in ENDS
    }
    for row, (m, n) in enumerate(pairs):
        for path in paths:
            start, one, other = starts[m][path], of_narrow[m][path], of_wide[n][path]
            size = start.shape[1]
            products = (
                (0, one.a, other.a, other.b),
                (size, *(remove_directions(x.a, start) for x in (one, other)), other.b),
                (0, one.a, other.a[:, size:], other.b[size:]),
            )
            for end, (removed, a1, a2, b2) in zip(ENDS, products, strict=True):
                u1 = np.asarray(delta_svd(a1, one.b, one.scale).basis("input"))
                u2 = np.asarray(delta_svd(a2, b2, other.scale).basis("input"))
                count = shared_directions(u1, u2, num_removed=removed).count
                found[f"count{end}"][row].append(int(count))
                found[f"phi_first{end}"][row].append(float(np.square(u1[:, 0] @ u2[:, 0])))
    return {"pairs": [list(pair) for pair in pairs], **found}


def write(workdir, out) -> None:
    """Measures the runs of what_rank_2's sweeps, keeps the numbers, and makes the page."""
    save(measure(study.folders_of(workdir, ("qv-r8", "qv-r64"))), Path(out))
    page(out)


def page(out) -> None:
    """The page, from the numbers that were kept in `out`."""
    data = read(out)
    pages.write_page(
        out, name="directions_2", title="Directions in common",
        commands=["python -m experiments.analysis directions_2 runs/what_rank_2"],
        runs_of="what_rank_2", verdicts=verdicts(data),
        parts=[pages.save_figure(figure(data), Path(out), "directions", "Shared directions"),
               *tables(data)],
    )  # fmt: skip


def save(data: Mapping[str, Any], out: Path) -> None:
    """Writes what `measure` returned to `out`/directions.json."""
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "directions.json", data)


def read(out: Path) -> dict[str, Any]:
    """What `save` wrote: the page can be made again without the adapters."""
    return study.read_numbers(Path(out) / "directions.json")


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    """The verdict on each hypothesis of this file."""
    of_seeds, across, within = data["seeds"], data["ranks_across"], data["ranks_within"]
    seeds = sorted({seed for pair in of_seeds["pairs"] for seed in pair})

    def mean(part: Mapping[str, Any], name: str):
        return mean_of_pairs(np.mean(part[name], axis=1), part["pairs"])

    few = np.asarray(of_seeds["count_few"])
    gap = few[:, _places(data, "value")].mean(1) - few[:, _places(data, "query")].mean(1)
    more_in_v = mean_of_pairs(gap, of_seeds["pairs"])
    raw, outside, others = (mean(within, f"count{end}") for end in ENDS)
    apart = mean(across, "count_others")
    rows = (
        ("some", "two seeds share more than 0.5 of 64 directions",
         mean(of_seeds, "count"), 0.5, "directions", "above"),
        ("few", "they share fewer than 4", mean(of_seeds, "count"), 4.0, "directions", "below"),
        ("some_of_the_first", "of their first 8 they share more than 0.5",
         mean(of_seeds, "count_few"), 0.5, "directions", "above"),
        ("more_in_v", "of their first 8 they share more in v than in q",
         more_in_v, 0.0, "directions", "above"),
        ("top_differs", "φ(1, 1) of r = 8 and r = 64 of different seeds is below 0.5",
         mean(across, "phi_first"), 0.5, "", "below"),
        ("ranks_share", "r = 8 and r = 64 of different seeds share more than 0.5 directions",
         mean(across, "count"), 0.5, "directions", "above"),
        ("start_is_most", "within a seed, more than 3 more with r = 64 than with its other columns",
         lambda kept: raw(kept) - others(kept), 3.0, "directions", "above"),
        ("same_path", "and without the start more than 0.5 more than with the other columns",
         lambda kept: outside(kept) - others(kept), 0.5, "directions", "above"),
        ("nothing_left", "with the other columns, as many within a seed as across, within 0.5",
         lambda kept: others(kept) - apart(kept), 0.5, "directions", "equivalent"),
    )  # fmt: skip
    return [
        decide(Claim(name, claim, kind, margin, unit), jackknife(statistic, seeds))
        for name, claim, statistic, margin, unit, kind in rows
    ]


def tables(data: Mapping[str, Any]) -> list[str]:
    """Two Markdown tables: seeds by matrix, and ranks with and without the start."""
    part, width, (narrow, wide), few = data["seeds"], data["width"], data["ranks"], data["few"]
    lines = [
        f"| matrix | shared of {wide} | of the first {few} | of {wide} outputs | φ(1, 1) | "
        f"φ({few}, {few}) | φ({wide}, {wide}) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    names = ("count", "count_few", "count_output", "phi_first", "phi_few", "phi_all")
    means = {name: np.mean(part[name], axis=0) for name in names}
    for n, path in enumerate(data["matrices"]):
        cells = [f"{means[name][n]:.{2 if 'count' in name else 3}f}" for name in names]
        lines.append(f"| {learned.short(path)} | " + " | ".join(cells) + " |")
    null = [f"{k / width:.3f}" for k in (1, few, wide)]
    lines.append("| random spaces | 0.01 | 0.01 | 0.01 | " + " | ".join(null) + " |")
    more = [
        f"| r = {narrow} and r = {wide} of | shared | without the start | other columns | "
        "φ(1, 1) | without the start | other columns |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, key in (("different seeds", "ranks_across"), ("one seed", "ranks_within")):
        cells = [
            _interval(data[key], name + end) for name in ("count", "phi_first") for end in ENDS
        ]
        more.append(f"| {title} | " + " | ".join(cells) + " |")
    return ["\n".join(lines), "\n".join(more)]


def _interval(part: Mapping[str, Any], name: str) -> str:
    seeds = sorted({seed for pair in part["pairs"] for seed in pair})
    statistic = mean_of_pairs(np.mean(part[name], axis=1), part["pairs"])
    found = jackknife(statistic, seeds).interval()
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


def figure(data: Mapping[str, Any]):
    """Marginal gains by k of q and v with the null, and shared directions by layer."""
    from matplotlib.figure import Figure

    gains = np.asarray(data["seeds"]["gains"])
    k = np.arange(1, gains.shape[1] + 1)
    null = np.asarray(marginal_similarity(expected_similarity(k.size, k.size, data["width"])))
    canvas = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for kind, colour in (("query", "#2f86c9"), ("value", "#d9661f")):
        places = _places(data, kind)
        left.plot(k, gains[places].mean(axis=0), color=colour, label=kind)
        counts = np.mean(data["seeds"]["count_few"], axis=0)[places]
        right.plot(np.arange(len(places)), counts, "o-", color=colour, label=kind)
    left.plot(k, null, "k:", label="random spaces")
    left.set(xlabel="k", ylabel="gain of the k-th direction", title="k·φ(k,k) - (k-1)·φ(k-1,k-1)")
    right.set(xlabel="layer", title=f"Shared by two seeds, of the first {data['few']}")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return canvas


def _places(data: Mapping[str, Any], kind: str) -> Sequence[int]:
    return [n for n, path in enumerate(data["matrices"]) if f"/{kind}/" in path]
