"""Training a finished cell again and comparing: with its pack bit for bit, or alone."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.io.run_adapter import load_trainable
from lora_jax.io.untrusted import read_arrays
from lora_jax.parallel.mesh import make_mesh, read_mesh
from lora_jax.settings import Settings, config_hash
from lora_jax.sweeps.groups import make_groups
from lora_jax.sweeps.prepared import make_ready
from lora_jax.sweeps.stored import FAILURE, read_failure, train_pack, write_failure
from lora_jax.sweeps.view import SweepView
from lora_jax.train import enable_compilation_cache, train_cell
from lora_jax.train.build import Base, load_base
from lora_jax.train.callbacks import Options
from lora_jax.train.cell import CHANGED_TO, Cell
from lora_jax.train.environment import device_description, differences, versions
from lora_jax.train.evaluate_run import check_completion_format, check_unchanged
from lora_jax.train.loop import Diverged
from lora_jax.train.record import Card
from lora_jax.train.signals import Interrupted
from lora_jax.train.workdir import config_from, lock_workdir, read_json_file
from lora_jax.train.write_results import hash_trainable

# Numerical noise of validation and test loss, in nats, at most: between a cell in its pack and the
# same cell alone, or on another kind of device.
TOLERANCE = 0.01
COMPARED_VERSIONS = ("jax", "jaxlib", "numpy", "flax", "optax")
COMPARED_METRICS = ("train", "validation", "test", "stopped", "steps", "weights_sha256")

# What the record calls them, as a user sets them.
_SHOWN_AS = {
    "x64": "JAX_ENABLE_X64",
    "disable_jit": "JAX_DISABLE_JIT",
    "disable_most_optimizations": "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "xla_flags": "XLA_FLAGS",
    "matmul_precision": "matmul precision",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a cell came out the second time.

    `same`: every bit of the weights, predictions and metrics (`exact`), or the losses within
    `tolerance`. `differences` names what is not the same, bit for bit; `conditions` what is
    different about this machine; `loss_differences` those of the validation and test loss, in nats.
    """

    cell: str
    same: bool
    exact: bool
    tolerance: float
    differences: tuple[str, ...]
    conditions: tuple[str, ...]
    loss_differences: Mapping[str, float]


def verify(
    run: str | Path, *, alone: bool = False, tolerance: float = TOLERANCE, progress: bool = True
) -> list[Verdict]:
    """Trains what the cell folder `run` says again, in a folder of its own, and compares.

    With its whole pack, if it had one, and then each cell of the pack is compared; `alone` trains
    this cell alone, at its true rank. On the same kind of device with the same versions every bit
    must agree; elsewhere, and `alone` for a packed cell, the losses must within `tolerance`. `run`
    is untouched. Raises `RequestError` for a cell that is not finished or whose card, model or data
    are not what they were.
    """
    run = at_home(run).resolve()
    card = _read_card(run)
    packed = card.program.K > 1 and not alone
    names = (packed and card.program.cells) or [run.name]
    folders = [run.parent / name for name in names]
    cells = [Cell(folder.name, _config_of(folder)) for folder in folders]
    enable_compilation_cache()
    conditions = tuple(_conditions(card))
    base = load_base(cells[0].config, _mesh_of(card))
    check_unchanged("data", card.data_hash, base.splits.data_hash, run.name)
    check_unchanged("base model's weights", card.base_hash, base.model.base_hash, run.name)
    for folder, cell in zip(folders, cells, strict=True):
        if not (folder / "adapter").exists():
            continue
        description = load_trainable(folder / "adapter")[1]
        check_completion_format(description, base.model, cell.config.model, folder.name)
    exact = not conditions and (packed or card.program.K == 1)
    with (
        tempfile.TemporaryDirectory(prefix="lora-jax-verify-") as home,
        lock_workdir(home),
        SweepView(enabled=progress) as view,
    ):
        again = Path(home)
        view.expect(len(cells), card.metrics.steps * len(cells))
        with view.running(len(cells), card.metrics.steps):
            try:
                if packed:
                    _train_pack(cells, base, card.program.at_once or 0, again, view)
                else:
                    folder = again / "cells" / run.name
                    train_cell(
                        cells[0].config, folder, Options(show_with=view.show_with), base=base
                    )
            except Diverged as error:
                write_failure(again / "cells" / run.name, str(error), [])
            except Interrupted:
                # What it saved goes with its folder.
                raise Interrupted("stopped; nothing was compared, and nothing is kept") from None
        return [
            _compare(folder, again / "cells" / folder.name, exact, tolerance, conditions)
            for folder in folders
        ]


def _train_pack(
    cells: Sequence[Cell], base: Base, at_once: int, workdir: Path, view: SweepView
) -> None:
    packs, refused = make_groups(cells, base)
    if refused or len(packs) != 1:
        raise RequestError(
            f"the cells {', '.join(cell.name for cell in cells)} do not share a program in this "
            "version; use the one that their cards name, or --alone"
        )
    ready = make_ready(packs[0], base, at_once=at_once)
    train_pack(ready, base, workdir, Options(show_with=view.show_with), memory_bytes=0)


def _read_card(cell: Path) -> Card:
    path = cell / "card.json"
    if not path.exists():
        raise RequestError(f"{cell} has no card.json; give a finished run's WORKDIR/cells/NAME")
    card = Card.read(path)
    if config_hash(card.config) != card.config_hash:
        raise RequestError(
            f"the config in {path} does not have the hash {card.config_hash[:12]} that its "
            "card names: one of them was changed"
        )
    return card


def _config_of(cell: Path) -> Settings:
    """The config of a cell of the pack, finished or failed."""
    if (cell / "card.json").exists():
        return config_from(_read_card(cell).config, cell / "card.json")
    if not (cell / "config.json").exists():
        raise RequestError(
            f"{cell} is missing, and its pack cannot be trained without it; put it back, or use "
            "--alone"
        )
    return config_from(read_json_file(cell / "config.json"), cell / "config.json")


def _conditions(card: Card) -> list[str]:
    """What is different here from where the card was made, of what decides about rounding."""
    device, own_versions, program = device_description(), versions(), card.program
    record = program.numerics
    if record is None:  # cards from before the whole record have these two of it
        record = {"xla_flags": program.xla_flags, "matmul_precision": program.matmul_precision}
    found = [(f"device {key}", there, device.get(key)) for key, there in card.device.items()]
    found += [(name, card.versions.get(name), own_versions[name]) for name in COMPARED_VERSIONS]
    found += [
        (_SHOWN_AS.get(name, name), repr(was), repr(now))
        for name, (was, now) in differences(record).items()
        if name not in (*COMPARED_VERSIONS, "backend")  # versions and device are above
    ]
    if program.mesh and CHANGED_TO in program.mesh:
        found.append(("mesh", program.mesh, "one device"))
    changed = [f"{what} was {there}, is {now}" for what, there, now in found if there != now]
    changes = program.numerics_changes or ()
    return [*changed, *(f"in the middle of training, {change}" for change in changes)]


def _mesh_of(card: Card) -> Mesh | None:
    """The mesh that the card names; None where this machine has not as many devices, or the
    training went on on another, which are conditions."""
    text = card.program.mesh or ""
    same = card.device.get("count") == jax.device_count() and CHANGED_TO not in text
    return make_mesh(read_mesh(text)) if text and same else None


def _compare(
    first: Path, second: Path, exact: bool, tolerance: float, conditions: tuple[str, ...]
) -> Verdict:
    verdict = functools.partial(
        Verdict, first.name, exact=exact, tolerance=0.0 if exact else tolerance,
        conditions=conditions,
    )  # fmt: skip
    if not (first / "card.json").exists() or not (second / "card.json").exists():
        was, now = (_failure(path) for path in (first, second))
        difference = f"failure was: {was or 'did not fail'}; is: {now or 'did not fail'}"
        same = bool(was and now) and (was == now or not exact)
        return verdict(
            same=same, differences=() if was == now else (difference,), loss_differences={}
        )
    was, now = (Card.read(path / "card.json").metrics for path in (first, second))
    found, again = was.to_json(), now.to_json()
    differences = [
        f"metrics.{name} was {found.get(name)}, is {again.get(name)}"
        for name in COMPARED_METRICS
        if found.get(name) != again.get(name)
    ]
    before, after = (_predictions(path / "test_predictions.npz") for path in (first, second))
    differences += [
        f"predictions: {name} differs in {_num_different(before.get(name), value)} places"
        for name, value in after.items()
        if name not in before or before[name].tobytes() != value.tobytes()
    ]
    if (first / "adapter").exists():
        found = hash_trainable(load_trainable(first / "adapter")[0])
        if found != now.weights_sha256:
            differences.append(f"the adapter's weights have the hash {found[:12]}, not those now")
    losses = {
        "validation": abs(was.validation.loss - now.validation.loss),
        "test": abs(was.test.loss - now.test.loss),
    }
    same = not differences if exact else all(loss <= tolerance for loss in losses.values())
    return verdict(same=same, differences=tuple(differences), loss_differences=losses)


def _failure(cell: Path) -> str:
    """How the cell failed, "" if it did not."""
    return read_json_file(cell / FAILURE)["error"] if read_failure(cell) is not None else ""


def _predictions(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a predictions file. Raises `RequestError` if it is missing or damaged."""
    try:
        return read_arrays(path)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"cannot read {path}: {error}; put it back: without it there is little to compare"
        ) from error


def _num_different(first: np.ndarray | None, second: np.ndarray) -> int:
    if first is None or first.shape != second.shape:
        return len(second)
    return int(np.sum(first != second))
