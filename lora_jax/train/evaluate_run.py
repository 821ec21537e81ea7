"""A finished cell evaluated again, on any split of its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.data import (
    EvalBatches,
    Examples,
    Splits,
    bucket_lengths,
    eval_batches,
    load_splits,
)
from lora_jax.io.untrusted import COUNT, check_fields
from lora_jax.models import Model
from lora_jax.parallel.placement import Placement, place
from lora_jax.settings import Settings, config_hash
from lora_jax.train.adapted import Adapted, load_run_adapter
from lora_jax.train.compilation import CompiledByShape
from lora_jax.train.evaluate import Evaluation, evaluate, make_scores
from lora_jax.train.record import RESTORE, Card
from lora_jax.train.task import Task, task_of
from lora_jax.train.workdir import config_from, read_json_file
from lora_jax.train.write_results import completion_format


def load_cell(cell: Path, mesh: Mesh | None = None) -> tuple[Settings, Adapted, Splits]:
    """A finished cell's config, its model with what was trained, and the data it was trained on.

    Raises `RequestError` if the data have changed since, or completions were encoded otherwise.
    """
    config = config_from(config_of(cell), cell / "config.json")
    adapted = load_run_adapter(cell / "adapter", mesh)
    check_completion_format(adapted.description, adapted.model, config.model, cell.name)
    splits = load_splits(config.data, target=task_of(config.model).target)
    check_fields(adapted.description, {"data_hash": str}, f"{cell}/adapter", RESTORE)
    check_unchanged("data", adapted.description["data_hash"], splits.data_hash, cell.name)
    return config, adapted, splits


def check_unchanged(what: str, there: str, here: str, name: str) -> None:
    """Raises `RequestError` if the hash of what a run was trained on is another here."""
    if there != here:
        raise RequestError(
            f"the {what} have changed since {name} was trained (hash {there[:12]}, now "
            f"{here[:12]}); put the old ones back or train again"
        )


def encoded_batches(
    config: Settings, task: Task, model: Model, examples: Examples, largest: int | None = None
) -> EvalBatches:
    """The examples as the run's evaluations have them, in batches of `largest` at most."""
    encoded = task.encode(model, examples, max_length=config.data.max_length)
    size = config.train.eval_batch_size
    return eval_batches(
        encoded,
        batch_size=size if largest is None else min(size, largest),
        buckets=bucket_lengths(config.data.buckets, config.data.max_length),
    )


def config_of(cell: Path) -> dict[str, Any]:
    """The cell's config. Raises `RequestError` if it is not the one that its card names."""
    path, card = cell / "config.json", cell / "card.json"
    config = read_json_file(path)
    sections = {"model": dict, "data": dict, "train.eval_batch_size": COUNT}
    check_fields(config, sections, path, RESTORE)
    if card.exists() and config_hash(config) != Card.read(card).config_hash:
        raise RequestError(
            f"{path} does not have the hash that {card} names: one of them was changed; {RESTORE}"
        )
    return config


def check_completion_format(
    description: Mapping[str, Any], model: Model, settings: Any, name: str
) -> None:
    """Raises `RequestError` if a run was trained on other ids than its texts have now."""
    wanted = completion_format(model, settings)
    if description.get("completions") != wanted.get("completions"):
        raise RequestError(
            f"{name} was trained by an earlier version, which gave its completions no BOS or put a "
            "spare space before them; here it would meet other tokens: train it again in another "
            "workdir"
        )


@partitionable()
def evaluate_cell(
    cell: Path, *, split: str = "test", merged: bool = False, mesh: Mesh | None = None
) -> tuple[Evaluation, Splits]:
    """Scores the adapter of `cell` on a split of the data it was trained with.

    With `merged` the adapter is folded into the base first and the plain model is run; all of it on
    `mesh` where there is one. Returns the scores and the data. Raises `RequestError` if the data
    have changed since.
    """
    config, adapted, splits = load_cell(cell, mesh)
    task = task_of(config.model, splits)
    batches = encoded_batches(config, task, adapted.model, getattr(splits, split))
    trainable, frozen = adapted.merged if merged else (adapted.trainable, adapted.frozen)
    constrain = put = None
    if mesh is not None:
        placement = Placement(mesh, adapted.model)
        trainable = place(trainable, placement.trainable(adapted.method, trainable))
        frozen = place(frozen, placement.params(frozen))
        constrain = placement.constrain
        put = placement.place_batch
    scores = make_scores(adapted.model.apply, adapted.method, task=task, constrain=constrain)
    scores = CompiledByShape(scores, put)
    return evaluate(scores, trainable, frozen, batches), splits
