"""Do two seeds learn the same directions, and how many? (Hu et al. 2021, Section 7.2, Figure 4)

    python -m experiments.analysis subspace_seeds runs/what_rank    # reads the runs of what_rank

Compared: five seeds of r = 64 on q,v of MiniLM on WordNet's glosses at its best rate: ten pairs,
φ(i, j) of ΔW in the space of inputs, q and v apart, against two random Gaussian matrices. A seed
draws `a`, the head, and the order of the data.

The source: at r = 64 on GPT-3's layer 48, ΔW of q has more directions in common between two seeds
than ΔW of v ("a higher intrinsic rank"), and two Gaussian matrices have none.

Hypotheses, written before those runs were looked at; "common directions" are the largest k for
which φ(k, k), the mean over pairs, is above the highest of 32 random pairs at (k, k) plus 0.05:
- some_in_common: at least one common direction in at least 10 of the 12 matrices.
- q_more_than_v: more common directions in q than in v, in at least 5 of the 6 layers, as there.
- few: no matrix has more than 16 of its 64.
Measured: experiments/results/subspace_seeds/README.md.

Limits (a review, after the runs): the count is an artefact. φ(k, k) is cumulative: in a simulation
(r = 64 in 384 dimensions) one shared direction counts as 15 and two as 28. In excess of random the
seeds share 0.6 to 2.3 directions: `few` is right, and its verdict here is wrong.
"""

import itertools

import numpy as np

from experiments.analysis import findings, hypotheses, learned
from lora_jax.analysis import expected_similarity, sample_similarity

RANK = 64
ABOVE = 0.05


def write(workdir, out) -> None:
    """Reads the finished sweep, and writes what was found."""
    runs = hypotheses.read_arms(workdir)[f"qv-r{RANK}"].runs
    bases = [learned.delta_bases(run) for run in runs]
    modules = list(bases[0])
    pairs = list(itertools.combinations(range(len(runs)), 2))
    phi = {module: learned.mean_similarity(bases, bases, module, pairs) for module in modules}
    width = bases[0][modules[0]].shape[0]
    null = np.asarray(expected_similarity(RANK, RANK, width))
    highest = np.asarray(sample_similarity(learned.key(0), RANK, RANK, width).max(axis=0))
    common = {
        module: int(max([0, *(1 + np.flatnonzero(np.diag(grid) > np.diag(highest) + ABOVE))]))
        for module, grid in phi.items()
    }
    q = [n for module, n in common.items() if "query" in module]
    v = [n for module, n in common.items() if "value" in module]
    more = sum(a > b for a, b in zip(q, v, strict=True))
    verdicts = [
        hypotheses.decide(
            "some_in_common",
            "a common direction in 10 of 12 matrices",
            f"in {sum(n > 0 for n in common.values())} of {len(common)}",
            sum(n > 0 for n in common.values()) >= 10,
        ),
        hypotheses.decide(
            "q_more_than_v",
            "more in q than in v, in 5 of 6 layers",
            f"in {more} of {len(q)}: q {q}, v {v}",
            more >= 5,
        ),
        hypotheses.decide(
            "few",
            "no matrix has more than 16",
            f"at most {max(common.values())}",
            max(common.values()) <= 16,
        ),
    ]
    lines = [
        "| matrix | common directions | φ(1, 1) | φ(8, 8) | φ(64, 64) |",
        "|---|---:|---:|---:|---:|",
    ]
    for module, grid in phi.items():
        lines.append(
            f"| {learned.short(module)} | {common[module]} | {grid[0, 0]:.3f} | {grid[7, 7]:.3f} | "
            f"{grid[-1, -1]:.3f} |"
        )
    lines.append(
        f"| random spaces, expected | | {null[0, 0]:.3f} | {null[7, 7]:.3f} | {null[-1, -1]:.3f} |"
    )
    panels = {
        "query, mean of six": sum(g for m, g in phi.items() if "query" in m) / len(q),
        "value, mean of six": sum(g for m, g in phi.items() if "value" in m) / len(v),
        "random spaces, expected": null,
    }
    findings.write_findings(
        out,
        title="Directions of two seeds",
        name="subspace_seeds",
        command="python -m experiments.analysis subspace_seeds runs/what_rank",
        verdicts=verdicts,
        parts=[
            findings.figure_file(
                learned.heat_maps(panels, "i, one seed", "j, another"), out, "similarity", runs
            ),
            "\n".join(lines),
        ],
        runs=runs,
        extra={"common_directions": common},
    )
