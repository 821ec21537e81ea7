"""What the adapters of finished runs learned, for the experiments that look inside."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lora_jax import RequestError, load_adapter
from lora_jax.analysis import basis_similarity, column_basis, delta_svd, factors_of
from lora_jax.models import flatten
from lora_jax.peft import Factors
from lora_jax.report.runs import Run
from lora_jax.train.build import keys_of

key = jax.random.key


@functools.lru_cache(maxsize=2)  # each with its own base
def adapted(folder):
    """The run's adapter on its base: `model`, `method`, `trainable`, `frozen`."""
    if not (folder / "adapter").is_dir():
        raise RequestError(f"{folder} has no adapter/ any more; train the sweep again")
    return load_adapter(folder)


def _factors(run: Run) -> Mapping[str, Factors]:
    return factors_at(run.folder)


def factors_at(folder) -> Mapping[str, Factors]:
    """`{path: factors}` of every adapted matrix of the run in this folder."""
    one = adapted(folder)
    return factors_of(one.method, one.trainable, one.model.params).factors


def starts_at(folder) -> dict[str, np.ndarray]:
    """`{path: a (d_in, r)}` before the first step, drawn again from the run's seed."""
    one = adapted(folder)
    init_key = keys_of(one.description["seed"])[1]
    trainable, _ = one.method.init(init_key, one.model.params)
    found = factors_of(one.method, trainable, one.model.params).factors
    return {path: np.asarray(x.a) for path, x in found.items()}


def delta_bases(run: Run) -> dict[str, np.ndarray]:
    """`{path: (d_in, r)}`: ΔW's singular vectors of inputs, of every adapted matrix."""
    return {
        path: np.asarray(delta_svd(x.a, x.b, x.scale).basis("input"))
        for path, x in _factors(run).items()
    }


def a_bases(run: Run) -> dict[str, np.ndarray]:
    """`{path: (d_in, r)}`: the singular vectors of `a` alone, as in the paper's Section 7.2."""
    return {path: np.asarray(column_basis(x.a)) for path, x in _factors(run).items()}


def lora_deltas(run: Run) -> dict[str, np.ndarray]:
    """`{path: ΔW (d_in, d_out)}` of every adapted matrix."""
    return {path: x.scale * x.a @ x.b for path, x in _factors(run).items()}


def full_deltas(run: Run, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """`{path: ΔW (d_in, d_out)}` of a run of full fine-tuning."""
    return full_deltas_at(run.folder, paths)


def full_deltas_at(folder, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """`{path: ΔW (d_in, d_out)}` of a run of full fine-tuning in this folder."""
    one = adapted(folder)
    base, tuned = (
        flatten(tree) for tree in (one.model.params, one.method.merge(one.trainable, one.frozen))
    )
    return {path: np.asarray(tuned[path]) - np.asarray(base[path]) for path in paths}


def base_kernels(run: Run, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """`{path: W (d_in, d_out)}` of the run's base."""
    return kernels_at(run.folder, paths)


def kernels_at(folder, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """`{path: W (d_in, d_out)}` of the base of the run in this folder."""
    base = flatten(adapted(folder).model.params)
    return {path: np.asarray(base[path]) for path in paths}


def mean_similarity(
    first: Sequence[Mapping[str, np.ndarray]],
    second: Sequence[Mapping[str, np.ndarray]],
    module: str,
    pairs: Sequence[tuple[int, int]],
) -> np.ndarray:
    """φ(i, j) of one matrix, the mean over pairs of runs."""
    grids = [basis_similarity(first[m][module], second[n][module]) for m, n in pairs]
    return np.mean([np.asarray(grid) for grid in grids], axis=0)


def short(path: str) -> str:
    """A matrix' path for a table: "layer 3 query".

    >>> short("encoder/layers/3/attention/query/kernel")
    'layer 3 query'
    """
    parts = path.split("/")
    layer = next((part for part in parts if part.isdecimal()), "")
    return f"layer {layer} {parts[-2]}"


def heat_maps(panels: Mapping[str, np.ndarray], first: str, second: str):
    """Grids of φ side by side, on one scale from 0 to 1."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one, (title, grid) in zip(axes, panels.items(), strict=False):
        image = one.imshow(
            grid, vmin=0, vmax=1, origin="lower", aspect="auto", interpolation="nearest",
            extent=(0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5),
        )  # fmt: skip
        one.set_title(title, fontsize=9)
        one.set_xlabel(second)
        one.set_ylabel(first)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="φ")
    return figure
