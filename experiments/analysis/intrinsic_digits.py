"""How many dimensions do handwritten digits need, by Fastfood and by a dense projection?

    python -m experiments.analysis intrinsic_digits                 # about 20 minutes on 2 cores
    python -m experiments.analysis intrinsic_digits --smoke         # half a minute, nothing kept

Compared: an MLP 64-32-10 (2,410 parameters) on scikit-learn's digits (900 training, 300 validation,
597 test images), 400 steps of AdamW on all training images at once, constant rate. θ = θ₀ + P θ_d
for d from 10 to 2,410, five random θ₀ and P; each d at the best of six rates by validation loss on
the first seed. d₉₀ is the smallest d whose mean accuracy is 90% of what training all parameters
reaches, at its own best rate. Then with shuffled labels, of which only the training accuracy means
anything: 300 images, 1,500 steps, rates by training loss, against the same 300 with true labels.

The source: Li et al. 2018 (arXiv:1804.08838): d₉₀ = 750 for an MLP of 199,210 parameters on MNIST;
Fastfood, sparse and dense projections agree; to memorise shuffled labels takes far more dimensions.

Hypotheses, written before the first run, in which the second part had all 900 images, 400 steps and
five rates: all parameters had learned 61% of the shuffled labels by then, no d 90% of that, which
says more of the steps than of d. So that part was changed, and both were run again:
- projections_agree: d₉₀ (test, true labels) by Fastfood and by a dense P differ by at most one step
  of the grid, a factor of 1.5.
- labels: d₉₀ of the training accuracy with shuffled labels is at least 3 times that with true ones.
Measured: experiments/results/intrinsic_digits/README.md.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from experiments.analysis import findings, hypotheses
from lora_jax.analysis import intrinsic_dimension

DIMS = (10, 15, 22, 33, 50, 75, 110, 165, 250, 370, 550, 830, 1250, 1850, 2410)
DENSE_DIMS = DIMS[:9]  # P is drawn at every step: the largest would take minutes a cell
RATES = (0.0015, 0.005, 0.015, 0.05, 0.15, 0.5)
FULL_RATES = (0.00015, 0.0005, 0.0015, 0.005, 0.015, 0.05)
SEEDS = (0, 1, 2, 3, 4)
NUM_STEPS = 400
NUM_MEMORISED, MEMORY_STEPS = 300, 1500
NAMES = {"true": "true", "few": "true", "shuffled": "shuffled"}
HIDDEN = 32


def load_digits(seed: int = 0):
    """`{split: (images (n, 64) in [0, 1], labels (n,))}` of a fixed split."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = (images[order] / 16).astype(np.float32)
    labels = labels[order].astype(np.int32)
    cuts = {"train": slice(0, 900), "validation": slice(900, 1200), "test": slice(1200, None)}
    return {name: (images[cut], labels[cut]) for name, cut in cuts.items()}


def make_params(seed: int):
    """θ₀: He's start."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (64, HIDDEN)) * (2 / 64) ** 0.5,
            "bias": jnp.zeros(HIDDEN),
        },
        "output": {
            "kernel": jax.random.normal(second, (HIDDEN, 10)) * (2 / HIDDEN) ** 0.5,
            "bias": jnp.zeros(10),
        },
    }


def logits_of(params, images):
    hidden, output = params["hidden"], params["output"]
    x = jax.nn.relu(images @ hidden["kernel"] + hidden["bias"])
    return x @ output["kernel"] + output["bias"]


def loss_of(params, batch):
    """Mean cross-entropy in nats."""
    images, labels = batch
    logits = jax.nn.log_softmax(logits_of(params, images))
    return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))


def accuracy(params, batch) -> float:
    images, labels = batch
    return float(np.mean(np.argmax(np.asarray(logits_of(params, images)), axis=1) == labels))


def measure(cells, rates, data, *, seeds, num_steps, progress) -> dict[str, dict[str, list[float]]]:
    """`{cell's name: {"lr": [chosen], "train": accuracies by seed, "test": …, "losses": by rate}}`.

    Rates are chosen on the first seed by the loss of `data["validation"]`.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        params = make_params(seed)
        tune = ("lr", rates) if seed == seeds[0] else None
        own = [
            {**cell, "seed": seed, **({} if tune else {"lr": found[cell["name"]]["lr"][0]})}
            for cell in cells
        ]
        rows = lj.sweep(
            loss_of,
            params,
            [data["train"]],
            own,
            num_steps=num_steps,
            tune=tune,
            validation=[data["validation"]],
            progress=progress,
        )
        if tune:
            tuned = rows.tuned()
            found = {
                one.name: {"lr": [one.chosen], "losses": list(one.losses), "train": [], "test": []}
                for one in tuned
            }
            best = {one.name: one.best for one in tuned}
        else:
            best = {row.name: row for row in rows}
        for name, row in best.items():
            merged = row.method.merge(row.trainable, params)
            for split in ("train", "test"):
                found[name][split].append(accuracy(merged, data[split]))
    return found


def write(out, smoke) -> None:
    """Trains all of it, and writes what was found; with `smoke` a few, and nothing is written."""
    dims, dense_dims = (DIMS[2:12:4], DIMS[2:7:4]) if smoke else (DIMS, DENSE_DIMS)
    seeds = SEEDS[:2] if smoke else SEEDS
    rates, full_rates = (RATES[1:3], FULL_RATES[1:3]) if smoke else (RATES, FULL_RATES)
    data = load_digits()
    images, labels = (part[:NUM_MEMORISED] for part in data["train"])
    few = {"train": (images, labels), "validation": (images, labels), "test": data["test"]}
    # Nothing but themselves can be learned of shuffled labels, so both are judged by that.
    shuffled = (images, np.random.default_rng(1).permutation(labels))
    random = {"train": shuffled, "validation": shuffled, "test": data["test"]}

    def subspaces(projection, dims):
        names = [{"name": f"{projection}-{d}", "dim": d} for d in dims]
        return [{"method": "intrinsic", "projection": projection, **name} for name in names]

    whole = [{"name": "full", "method": "full"}]
    found = {}
    for labels, own, num_steps in (
        ("true", data, NUM_STEPS),
        ("few", few, MEMORY_STEPS),
        ("shuffled", random, MEMORY_STEPS),
    ):
        num_steps = 30 if smoke else num_steps
        for cells, tried in (
            (subspaces("fastfood", dims), rates),
            (subspaces("dense", dense_dims) if labels == "true" else [], rates),
            (whole, full_rates),
        ):
            if cells:
                kind = f"{labels}-{cells[0].get('projection', 'full')}"
                print(f"{kind}: {len(cells)} cells, {len(tried)} rates", flush=True)
                measured = measure(
                    cells, tried, own, seeds=seeds, num_steps=num_steps, progress=False
                )
                found |= {f"{labels}-{name}": value for name, value in measured.items()}
    if smoke:
        print("ran; nothing is kept of a smoke run")
        return
    _write_found(found, out)


def _write_found(found, out: Path) -> None:
    """d₉₀ of each kind, verdicts, the figure."""

    def d90(labels, projection, dims, split):
        scores = [found[f"{labels}-{projection}-{d}"][split] for d in dims]
        return intrinsic_dimension(dims, scores, float(np.mean(found[f"{labels}-full"][split])))

    fast = d90("true", "fastfood", DIMS, "test")
    dense = d90("true", "dense", DENSE_DIMS, "test")
    train = d90("few", "fastfood", DIMS, "train")
    memory = d90("shuffled", "fastfood", DIMS, "train")
    near = (
        fast.dimension and dense.dimension and 1 / 1.55 <= fast.dimension / dense.dimension <= 1.55
    )
    grows = (
        None if train.dimension is None else (memory.dimension or DIMS[-1]) >= 3 * train.dimension
    )
    verdicts = [
        hypotheses.decide(
            "projections_agree",
            "d₉₀ by Fastfood and by a dense P within one step of the grid",
            f"{fast.dimension} (seeds {fast.per_seed}) and {dense.dimension} (seeds "
            f"{dense.per_seed})",
            bool(near),
        ),
        hypotheses.decide(
            "labels",
            "d₉₀ of training accuracy with shuffled labels at least 3 times that with true ones",
            f"{memory.dimension or 'above 2,410'} (seeds {memory.per_seed}) and {train.dimension} "
            f"(seeds {train.per_seed})",
            grows,
        ),
    ]
    lines = [
        "| labels, projection | accuracy of | all parameters | 90% of it | d₉₀ | seeds |",
        "|---|---|---:|---:|---:|---|",
    ]
    for labels, name, split, one in (
        ("true", "Fastfood", "test", fast),
        ("true", "dense", "test", dense),
        ("true (300 images)", "Fastfood", "training", train),
        ("shuffled (300 images)", "Fastfood", "training", memory),
    ):
        lines.append(
            f"| {labels}, {name} | {split} | {one.threshold / 0.9:.3f} | {one.threshold:.3f} | "
            f"{one.dimension or '> 2,410'} | "
            f"{', '.join(str(d or '> 2,410') for d in one.per_seed)} |"
        )
    edges = [
        name
        for name, one in found.items()
        if one["lr"][0]
        in ((min(FULL_RATES), max(FULL_RATES)) if "full" in name else (min(RATES), max(RATES)))
    ]
    note = (
        f"Best rate at an edge of its grid, so perhaps no optimum: {', '.join(edges)}."
        if edges
        else "No best rate lies at an edge of its grid."
    )
    findings.write_findings(
        out,
        title="The intrinsic dimension of digits",
        name="intrinsic_digits",
        command="python -m experiments.analysis intrinsic_digits",
        verdicts=verdicts,
        parts=["\n".join(lines), findings.figure_file(_draw(found), out, "dimension"), note],
        runs=[],
        extra={"accuracies": found},
    )


def _draw(found):
    """Accuracy against d with each seed, full training as lines, 90% of it dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    panels = (
        ("Test, true labels", "test", (("true", "fastfood", DIMS), ("true", "dense", DENSE_DIMS))),
        ("Training, 300", "train", (("few", "fastfood", DIMS), ("shuffled", "fastfood", DIMS))),
    )
    colours = {
        ("true", "fastfood"): "#2f86c9",
        ("true", "dense"): "#159b78",
        ("few", "fastfood"): "#2f86c9",
        ("shuffled", "fastfood"): "#c2699a",
    }
    for axes, (title, split, kinds) in zip(both, panels, strict=True):
        for labels, projection, dims in kinds:
            colour = colours[labels, projection]
            scores = np.array([found[f"{labels}-{projection}-{d}"][split] for d in dims])
            axes.plot(
                dims,
                scores.mean(axis=1),
                "o-",
                color=colour,
                label=f"{NAMES[labels]}, {projection}",
            )
            for column in scores.T:
                axes.plot(dims, column, ".", color=colour, alpha=0.35, markersize=4)
            full = float(np.mean(found[f"{labels}-full"][split]))
            if projection == "fastfood":
                axes.axhline(full, color=colour, linewidth=0.8, alpha=0.6)
                axes.axhline(0.9 * full, color=colour, linestyle="--", linewidth=0.8, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xlabel("d")
        axes.set_title(title)
        axes.legend(loc="lower right", fontsize=8)
    both[0].set_ylabel("accuracy; lines: all parameters, dashed: 90% of it")
    return figure
