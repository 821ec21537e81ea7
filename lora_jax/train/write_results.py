"""What a finished run leaves behind: adapter, predictions and, last of all, the card."""

from __future__ import annotations

import datetime
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.hashes import hash_params
from lora_jax.data import Splits
from lora_jax.data.completions import COMPLETION_FORMAT, differs_from_first_format
from lora_jax.io.atomic import atomic_path
from lora_jax.io.run_adapter import TENSORS, save_trainable
from lora_jax.methods import Method
from lora_jax.methods.table import MethodTable
from lora_jax.models import Model
from lora_jax.settings import config_hash
from lora_jax.train.cell import Progress
from lora_jax.train.environment import device_description, git_commit, versions
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.record import (
    BestScores,
    Card,
    Counts,
    FinalScores,
    Metrics,
    Program,
    Seconds,
    TrainLoss,
    config_parts,
)
from lora_jax.train.task import head_of
from lora_jax.train.task_metrics import TASK_METRICS


def write_results(
    cell: Path,
    config: dict[str, Any],
    model: Model,
    method: Method,
    splits: Splits,
    progress: Progress,
    trainable: Any,
    test: Evaluation,
    program: Program,
    config_file: str = "",
    announce: Callable[[Card], None] = lambda card: None,
) -> Card:
    """Writes adapter/, test_predictions.npz and card.json into `cell`; returns the card.

    `model`, `method` and `splits` are what was trained on what. `config_file` is the config as
    `--config=` had it, "FILE.py[:arg]". `announce` gets the card before it is written: if the
    process is killed there, the next one calls it again. The card comes last: where it is, all is.
    What a killed process left of the others is replaced.
    """
    assert progress.train_loss is not None  # a step was logged, and an evaluation followed
    assert progress.best_loss is not None and progress.best_accuracy is not None
    shutil.rmtree(cell / "adapter", ignore_errors=True)
    description = describe_adapter(config, model, method.drawn(trainable), splits)
    save_trainable(cell / "adapter", trainable, description)
    write_predictions(cell / "test_predictions.npz", test)
    file, arg = config_parts(config_file)
    kinds, scores = dict(progress.seconds), measure(test, splits.metrics)
    card = Card(
        config_file=file,
        config_arg=arg,
        config=config,
        config_hash=config_hash(config),
        base_hash=model.base_hash,
        data_hash=splits.data_hash,
        seeds={"seed": config["seed"], "data": config["data"]["seed"]},
        device=device_description(),
        program=program,
        counts=count_trainable(method.table(model.params), model.head_pattern),
        seconds=Seconds(
            total=sum(progress.seconds.values()),
            compile=kinds.pop("compile", 0.0),
            per_step=kinds.get("train", 0.0) / max(1, progress.step),
            shared_by=program.K,
            others=kinds,
        ),
        metrics=Metrics(
            train=TrainLoss(loss=progress.train_loss),
            validation=BestScores(
                loss=progress.best_loss,
                accuracy=progress.best_accuracy,
                best_step=progress.best_step,
            ),
            test=FinalScores(
                loss=test.loss,
                accuracy=test.accuracy,
                n=test.num_examples,
                tokens=scores.pop("tokens", None),
                others=scores,
            ),
            stopped=progress.stopped,
            steps=progress.step,
            adapter_bytes=os.path.getsize(cell / "adapter" / TENSORS),
            weights_sha256=hash_trainable(trainable),
        ),
        versions=versions(),
        commit=git_commit(),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    announce(card)
    card.write(cell / "card.json")
    return card


def measure(test: Evaluation, names: Sequence[str]) -> dict[str, Any]:
    """The metrics of these names, from labels and predictions; and where examples have weights
    other than 1, as texts do, the sum of them: `tokens`.
    """
    found = {}
    if test.predictions is not None:
        found = {name: TASK_METRICS[name](test.labels, test.predictions) for name in names}
    return found if np.all(test.weights == 1) else {**found, "tokens": int(test.weights.sum())}


def hash_trainable(trainable: Any) -> str:
    """sha256 (hex) of `{path: {part: array}}`: names, dtypes, shapes and bytes."""
    flat = {f"{path}:{part}": x for path, entry in trainable.items() for part, x in entry.items()}
    return hash_params(flat)


def describe_adapter(
    config: dict[str, Any], model: Model, drawn: dict[str, list[float]], splits: Splits
) -> dict[str, Any]:
    """What loading needs to put the tensors back, and what a reader wants to know."""
    return {
        "format": "lora_jax adapter 1",
        "model": config["model"],
        "method": config["method"],
        "seed": config["seed"],
        "base_hash": model.base_hash,
        "data_hash": splits.data_hash,
        "label_names": list(splits.label_names),
        "max_length": config["data"]["max_length"],
        **({"drawn": drawn} if drawn else {}),
        **completion_format(model, config["model"]),
    }


def completion_format(model: Model, settings: Any) -> dict[str, int]:
    """`{"completions": 2}` where BOS and single spaces changed how completions are encoded.

    Empty for labels, and for tokenizers that always gave these ids (GPT-2, SmolLM2).
    """
    if head_of(settings) != "causal-lm" or not differs_from_first_format(model.tokenizer):
        return {}
    return {"completions": COMPLETION_FORMAT}


def count_trainable(table: MethodTable, head_pattern: str) -> Counts:
    """Trained parameters: those of the task head, the others (the adapter), and both together."""
    head = sum(row.num_trainable for row in table if re.fullmatch(head_pattern, row.path))
    return Counts(adapter=table.num_trainable - head, head=head, total=table.num_trainable)


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """loss (N,) float32, correct (N,) bool, label (N,) int32, index (N,) int64; by index.

    Of texts `correct` is float32 and there is weight (N,) float32, the tokens that loss and correct
    are means over; of numbers the labels are float32. prediction (N,), like the labels, is there
    where a metric is taken of it.
    """
    arrays: dict[str, Any] = {
        "loss": evaluation.losses,
        "correct": evaluation.correct,
        "label": evaluation.labels,
        "index": evaluation.index,
    }
    if np.any(evaluation.weights != 1):
        arrays["weight"] = evaluation.weights
    if evaluation.predictions is not None:
        arrays["prediction"] = evaluation.predictions
    order = np.argsort(evaluation.index, kind="stable")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: array[order] for name, array in arrays.items()})
