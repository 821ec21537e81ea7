"""The intrinsic dimension of fine-tuning MiniLM, DID and SAID (Aghajanyan et al. 2020)

The hypotheses and their margins: `experiments/configs/intrinsic_dimension.py`.
"""

import math
from pathlib import Path

import numpy as np

from experiments.analysis import findings, hypotheses
from lora_jax import RequestError
from lora_jax.analysis import intrinsic_dimension

BESIDE = "what_rank"


def write(workdir, out, beside) -> None:
    """Reads the finished sweep and full fine-tuning's seeds, and writes what was found."""
    found = hypotheses.read_arms(workdir)
    runs = [run for one in found.values() for run in one.all_runs]
    full = findings.seeds_of(beside, "full")
    if other := {row["data_hash"] for row in full} - {run.card.data_hash for run in runs}:
        raise RequestError(
            f"{beside} is of other data, {other.pop()[:12]}; sweep what_rank on these, and give "
            "its workdir as --beside"
        )
    score = float(np.mean([row["test_accuracy"] for row in full]))
    dims = {
        kind: sorted(int(n.rpartition("-d")[2]) for n in found if n.startswith(kind))
        for kind in ("did", "said")
    }
    found = {f"{kind}-d{d}": found[f"{kind}-d{d}"] for kind, some in dims.items() for d in some}
    accuracies = {
        name: [run.card.metrics.test.accuracy for run in one.runs] for name, one in found.items()
    }
    d90 = {
        kind: intrinsic_dimension(some, [accuracies[f"{kind}-d{d}"] for d in some], score)
        for kind, some in dims.items()
    }
    did, said = d90["did"], d90["said"]
    # On the grid that both have; None where it has no d that could tell.
    if said.dimension is not None and (did.dimension is None or said.dimension <= did.dimension):
        not_above = True
    else:
        not_above = False if did.dimension is not None and said.below >= did.dimension else None
    small = True if (did.dimension or math.inf) <= 5000 else False if did.below >= 5000 else None
    verdicts = [
        hypotheses.decide("small", "d₉₀ by DID is at most 5,000", _text(did, dims["did"]), small),
        hypotheses.decide(
            "said", "d₉₀ by SAID is not above DID's", _text(said, dims["said"]), not_above
        ),
    ]
    lines = ["| subspace | test accuracy by seed | mean |", "|---|---|---:|"]
    for name, values in accuracies.items():
        shown = ", ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {name} | {shown} | {100 * np.mean(values):.1f} |")
    shown = ", ".join(f"{100 * row['test_accuracy']:.1f}" for row in full)
    lines.append(f"| full fine-tuning, of {Path(beside).name} | {shown} | {100 * score:.1f} |")
    lines.append(f"| 90% of it | | {90 * score:.1f} |")
    figure = _draw(accuracies, dims, score, did.threshold)
    findings.write_findings(
        out,
        title="The intrinsic dimension of fine-tuning",
        name="intrinsic_dimension",
        command="python -m experiments.analysis intrinsic_dimension runs/dim",
        verdicts=verdicts,
        parts=[
            "\n".join(lines),
            findings.figure_file(figure, out, "dimension", runs),
            findings.arm_table(found),
        ],
        runs=runs,
        extra={"full_fine_tuning": full},
    )


def _text(one, dims) -> str:
    if one.dimension is None:
        return f"above {dims[-1]:,}, the largest tried"
    seeds = ", ".join(str(d or f"> {dims[-1]}") for d in one.per_seed)
    return f"between {one.below:,} and {one.dimension:,} (by seed: {seeds})"


def _draw(accuracies, dims, score, threshold):
    """Accuracy against d, a line per structure, single seeds as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in (("did", "#2f86c9"), ("said", "#159b78")):
        means = [
            sum(accuracies[f"{kind}-d{d}"]) / len(accuracies[f"{kind}-d{d}"]) for d in dims[kind]
        ]
        axes.plot(dims[kind], means, "o-", color=colour, label=kind.upper())
        for d in dims[kind]:
            values = accuracies[f"{kind}-d{d}"]
            axes.plot([d] * len(values), values, ".", color=colour, alpha=0.5)
    axes.axhline(score, color="#d9661f", label="full fine-tuning")
    axes.axhline(threshold, color="#d9661f", linestyle="--", label="90% of it")
    axes.set_xscale("log")
    axes.set_xlabel("d")
    axes.set_ylabel("test accuracy")
    axes.legend()
    return figure
