"""Models of other libraries, adapted as they are: outputs and gradients against merge-then-apply.

    make zoo      or      .venv-zoo/bin/python -m experiments.zoo --out=experiments/results/zoo

Each model gets adapters of rank 2 on every path that `targets=".*"` adapts, with random non-zero A
and B, in float64. The oracle merges (W + ΔW) and calls the plain model. A row has the largest
difference of outputs and of the gradients with respect to A and B, relative to the largest entry of
the oracle's, and the number of adapters and of parameters for which W + ΔW was formed. The last row
trains an Equinox module with `lj.sweep`, five steps of AdamW, and compares losses ("outputs") and
factors ("gradients") with a loop of optax over the merged model; the sweep keeps learning rates in
float32, hence 1e-6 there. Exit code 1: a row raises, or differs by more than 1e-9 (1e-6).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

TOLERANCE, SWEEP_TOLERANCE = 1e-9, 1e-6
COLUMNS = ("model", "adapters", "materialised", "outputs", "gradients")


def judge(model) -> dict[str, object]:
    """Compares `lift` with merge-then-apply on one model.

    Args:
      model: a `models.Model`.

    Returns:
      The row: counts, and relative differences (dimensionless).
    """
    import jax
    import jax.numpy as jnp

    import lora_jax as lj

    axes = lj.kernel_axes(model.apply, model.params, model.x)
    method = lj.LoRA(targets=model.targets, rank=2, alpha=3.0, axes=axes)
    trainable, frozen = method.init(jax.random.key(0), model.params)
    trainable = _random(trainable)
    lifted = lj.lift(model.apply)

    def loss_of(call):
        def loss(trainable):
            y = call(trainable)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    with lj.watch_materialised() as events, warnings.catch_warnings():
        warnings.simplefilter("ignore", lj.MaterialisedWarning)
        (_, outputs), gradients = loss_of(lambda t: lifted(method.bind(t, frozen), model.x))(
            trainable
        )
    (_, expected), expected_gradients = loss_of(
        lambda t: model.apply(method.merge(t, frozen), model.x)
    )(trainable)
    return {
        "adapters": len(trainable),
        "materialised": len({event.path for event in events}),
        "outputs": _difference(outputs, expected),
        "gradients": _difference(gradients, expected_gradients),
    }


def judge_sweep(model) -> dict[str, object]:
    """Compares one cell of `lj.sweep` on a module tree with AdamW over the merged model."""
    import jax
    import jax.numpy as jnp
    import optax

    import lora_jax as lj
    from lora_jax.train.build import keys_of

    axes = lj.kernel_axes(model.apply, model.params, model.x)

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    cell = {"targets": model.targets, "rank": 2, "alpha": 3.0, "lr": 1e-2, "weight_decay": 0.0}
    cells = [cell, {**cell, "rank": 1}]
    (row, _) = lj.sweep(
        loss, model.params, [model.x], cells, num_steps=5, axes=axes, progress=False
    )
    if row.error:
        raise RuntimeError(row.error)
    method = lj.LoRA(targets=model.targets, rank=2, alpha=3.0, axes=axes)
    tx = optax.adamw(1e-2, weight_decay=0.0)
    trainable, frozen = method.init(keys_of(0)[1], model.params)  # where the sweep starts
    state, losses = tx.init(trainable), []
    step = jax.jit(jax.value_and_grad(lambda t: loss(method.merge(t, frozen), model.x)))
    for _ in range(5):
        value, gradients = step(trainable)
        losses.append(value)
        updates, state = tx.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return {
        "adapters": len(trainable),
        "materialised": 0,
        "outputs": _difference(row.losses, jnp.stack(losses)),
        "gradients": _difference(row.trainable, trainable),
    }


def _random(tree):
    import jax

    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [
        0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)


def _difference(found, expected) -> float:
    """The largest difference of two trees, relative to the largest entry of the second."""
    import jax
    import numpy as np

    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    largest = max(float(np.abs(e).max()) for _, e in pairs)
    return max(float(np.abs(np.asarray(f) - np.asarray(e)).max()) for f, e in pairs) / largest


def rows(names):
    """One row per model; a model that raises has the error's first line in it."""
    from experiments.zoo.models import MODELS, equinox_language_model

    judged = {name: (judge, build) for name, build in MODELS.items()}
    judged["equinox: module in lj.sweep, 5 steps"] = judge_sweep, equinox_language_model
    for name, (judge_of, build) in judged.items():
        if names and not any(part in name for part in names):
            continue
        try:
            found = judge_of(build())
            yield {"model": name, **found, "wrong": _is_wrong(found, judge_of)}
        except Exception as error:  # the row is the report
            lines = str(error).splitlines() or [""]
            yield {"model": name, "error": f"{type(error).__name__}: {lines[0][:160]}"}


def _is_wrong(found, judge_of) -> bool:
    tolerance = SWEEP_TOLERANCE if judge_of is judge_sweep else TOLERANCE
    return not max(found["outputs"], found["gradients"]) <= tolerance  # NaN is wrong, too


def markdown(found, command: str) -> str:
    """The page: protocol, one table row per model."""
    import importlib.metadata as metadata

    libraries = ("jax", "flax", "equinox", "diffrax", "optimistix")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in libraries)
    lines = [
        "# Models of other libraries", "",
        __doc__.split("\n\n")[2].replace("\n", " "), "",
        f"`{command}`, commit {_commit()}, {versions}, CPU.", "",
        "| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in found:
        if "error" in row:
            cells = [row["model"], "", "", row["error"], ""]
        else:
            numbers = [f"{row[name]:.1e}" for name in COLUMNS[3:]]
            cells = [row["model"], str(row["adapters"]), str(row["materialised"]), *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _commit() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], help="parts of model names")
    parser.add_argument("--out", type=Path, help="folder for zoo.md; not written with --only")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_enable_x64", True)
    found = []
    for row in rows(options.only):
        found.append(row)
        print(row, flush=True)
    page = markdown(found, "python -m experiments.zoo " + " ".join(argv or sys.argv[1:]))
    print("\n" + page)
    if options.out and not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "zoo.md").write_text(page, encoding="utf-8")
    return int(any(row.get("wrong", True) for row in found))


if __name__ == "__main__":
    sys.exit(main())
