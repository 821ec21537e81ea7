"""What a finished run leaves behind: adapter, predictions and, last of all, the card."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.formats.adapter import TENSORS, save_trainable
from lora_jax.formats.atomic import atomic_path, write_json
from lora_jax.methods.table import MethodTable
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.build import Setup
from lora_jax.train.card import describe_program, device_description, make_card
from lora_jax.train.evaluate import Evaluation
from lora_jax.train.workdir import config_hash


def write_results(
    cell: Path,
    config: dict[str, Any],
    setup: Setup,
    books: Bookkeeping,
    trainable: Any,
    test: Evaluation,
) -> dict[str, Any]:
    """Writes adapter/, test_predictions.npz and card.json into `cell`; returns the card.

    The card comes last: where it is, all is. What a killed process left of the others is replaced.
    """
    shutil.rmtree(cell / "adapter", ignore_errors=True)
    save_trainable(cell / "adapter", trainable, describe_adapter(config, setup))
    write_predictions(cell / "test_predictions.npz", test)
    table = setup.method.table(setup.model.params)
    device = device_description()
    seconds = books.seconds
    card = make_card(
        config=config,
        config_hash=config_hash(config),
        base_hash=setup.model.base_hash,
        data_hash=setup.splits.data_hash,
        seeds={"seed": config["seed"], "data": config["data"]["seed"]},
        device=device,
        program=describe_program(table, setup.step.shapes, threads=device["threads"]),
        counts=count_trainable(table, setup.model.head_pattern),
        seconds={
            **seconds,
            "total": sum(seconds.values()),
            "per_step": seconds.get("train", 0.0) / max(1, books.step),
            "compile": seconds.get("compile", 0.0),
        },
        metrics={
            "train": {"loss": books.train_loss},
            "validation": {
                "loss": books.best_loss,
                "accuracy": books.best_accuracy,
                "best_step": books.best_step,
            },
            "test": {"loss": test.loss, "accuracy": test.accuracy, "n": test.num_examples},
            "stopped": books.stopped,
            "steps": books.step,
            "adapter_bytes": os.path.getsize(cell / "adapter" / TENSORS),
        },
    )
    write_json(cell / "card.json", card)
    return card


def describe_adapter(config: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """What `load_adapter` needs to put the tensors back, and what a reader wants to know."""
    return {
        "format": "lora_jax adapter 1",
        "model": config["model"],
        "method": config["method"],
        "seed": config["seed"],
        "base_hash": setup.model.base_hash,
        "data_hash": setup.splits.data_hash,
        "label_names": list(setup.splits.label_names),
        "max_length": config["data"]["max_length"],
    }


def count_trainable(table: MethodTable, head_pattern: str) -> dict[str, int]:
    """Trained parameters: those of the task head, the others (the adapter), and both together."""
    head = sum(row.num_trainable for row in table if re.fullmatch(head_pattern, row.path))
    return {"adapter": table.num_trainable - head, "head": head, "total": table.num_trainable}


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """loss (N,) float32, correct (N,) bool, label (N,) int32, index (N,) int64; by index."""
    order = np.argsort(evaluation.index, kind="stable")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            loss=evaluation.losses[order],
            correct=evaluation.correct[order],
            label=evaluation.labels[order],
            index=evaluation.index[order],
        )
