"""Do adapters of rank 8 and 64 learn the same directions? (Hu et al. 2021, Section 7.2, Figure 3)

    python -m experiments.analysis subspace_ranks runs/what_rank    # reads the runs of what_rank

Compared: r = 8 and r = 64 on q,v of MiniLM on WordNet's glosses, each at its best rate, five seeds
each; φ(i, j) in the space of inputs, of ΔW and, as in the paper, of `a` alone; layer by layer.

A trap that the figure must avoid: here (and wherever a wider adapter's start begins with a narrower
one's) r = 8 and r = 64 of one seed share the start of eight columns of `a`, so that `a` of both
looks alike though nothing was learned. Pairs are of different seeds, therefore (20 of them: seed m
with seed n, m ≠ n); pairs of one seed are shown too, as what that shared start does.

The source: on GPT-3 (layers 1, 32, 64, 96 of 96) the top direction of r = 8 and of r = 64 have
φ > 0.5 in common, the others little: "this provides an explanation of why r = 1 performs well".

Hypotheses, written before those runs were looked at:
- top_direction: φ(1, 1) of ΔW, the mean over twelve matrices and 20 pairs, is above 0.5.
- others_noise: φ(8, 8) of ΔW, the same mean, is below 0.5, too.
- beyond_random: φ(1, 1) is above the highest of 32 random pairs in at least 10 of the 12 matrices
  (means over pairs).
Measured: experiments/results/subspace_ranks/README.md.

Limits (a review, after the runs): the trainings are those of what_rank, whose adapters share the
head's learning rate; directions beyond the first few of a ΔW with 90% of its energy in two are
mostly initialisation.
"""

import itertools

import numpy as np

from experiments.analysis import findings, hypotheses, learned
from lora_jax.analysis import expected_similarity, sample_similarity
from lora_jax.report.runs import Run

RANKS = (8, 64)


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    runs: dict[int, tuple[Run, ...]] = {rank: found[f"qv-r{rank}"].runs for rank in RANKS}
    svds = {rank: [learned.delta_bases(run) for run in runs[rank]] for rank in RANKS}
    of_a = {rank: [learned.a_bases(run) for run in runs[rank]] for rank in RANKS}
    modules = list(svds[8][0])
    seeds = range(min(len(one) for one in runs.values()))
    apart = [(m, n) for m, n in itertools.product(seeds, seeds) if m != n]
    same = [(m, m) for m in seeds]
    phi = {
        (what, which): {
            module: learned.mean_similarity(bases[8], bases[64], module, pairs)
            for module in modules
        }
        for what, bases in (("ΔW", svds), ("a", of_a))
        for which, pairs in (("different seeds", apart), ("one seed", same))
    }
    main = phi["ΔW", "different seeds"]
    width = svds[8][0][modules[0]].shape[0]
    null = np.asarray(expected_similarity(*RANKS, width))
    highest = np.asarray(sample_similarity(learned.key(0), *RANKS, width).max(axis=0))
    top = {module: float(grid[0, 0]) for module, grid in main.items()}
    rest = {module: float(grid[7, 7]) for module, grid in main.items()}
    used = [run for some in runs.values() for run in some]
    panels = {
        **{learned.short(m): main[m] for m in modules if "/1/" in m or "/4/" in m},
        "mean of twelve": sum(main.values()) / len(main),
        "random spaces, expected": null,
    }
    findings.write_findings(
        out,
        title="Directions of rank 8 and of rank 64",
        name="subspace_ranks",
        command="python -m experiments.analysis subspace_ranks runs/what_rank",
        verdicts=_verdicts(top, rest, null, highest),
        parts=[
            findings.figure_file(
                learned.heat_maps(panels, "i, r = 8", "j, r = 64"), out, "similarity", used
            ),
            _table(phi, null),
            "Pairs of one seed begin with eight columns of `a` in common, so that their φ says how "
            "much of the start is left, too. The source does not say whether its adapters of two "
            "ranks shared a seed. With movie reviews, two classes instead of 26, two seeds of one "
            "rank have far more in common: see notebooks/02_rank_subspaces.",
        ],
        runs=used,
        extra={"phi_1_1": top, "phi_8_8": rest},
    )


def mean(values) -> float:
    return sum(values) / len(values)


def _verdicts(top, rest, null, highest):
    """Of φ(1, 1) and φ(8, 8) by matrix, with random spaces."""
    above = sum(value > highest[0, 0] for value in top.values())
    return [
        hypotheses.decide(
            "top_direction",
            "mean φ(1, 1) above 0.5",
            f"{mean(top.values()):.3f} ({min(top.values()):.2f} to {max(top.values()):.2f} by "
            f"matrix; random {null[0, 0]:.4f})",
            mean(top.values()) > 0.5,
        ),
        hypotheses.decide(
            "others_noise",
            "mean φ(8, 8) below 0.5",
            f"{mean(rest.values()):.3f} (random {null[7, 7]:.3f})",
            mean(rest.values()) < 0.5,
        ),
        hypotheses.decide(
            "beyond_random",
            "φ(1, 1) above the highest of 32 random pairs in 10 of 12 matrices",
            f"{above} of {len(top)} (highest random {highest[0, 0]:.3f})",
            above >= 10,
        ),
    ]


def _table(phi, null) -> str:
    """Markdown: mean φ at three places, by pair, and of random spaces."""
    lines = ["| φ of | pairs of | φ(1, 1) | φ(8, 8) | φ(8, 64) |", "|---|---|---:|---:|---:|"]
    for (what, which), grids in phi.items():
        cells = [
            mean([float(g[i, j]) for g in grids.values()]) for i, j in ((0, 0), (7, 7), (7, 63))
        ]
        lines.append(f"| {what} | {which} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    cells = [null[0, 0], null[7, 7], null[7, 63]]
    lines.append("| random spaces | expected | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    return "\n".join(lines)
