"""Synthetic working folders: runs with known scores, written the way training writes them."""

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cards import card_json

CONFIG = {
    "seed": 0,
    "model": {"name": "minilm", "num_labels": 2, "dtype": "float32"},
    "data": {"source": "reviews", "path": "", "buckets": [16, 24, 32], "seed": 0, "limit": 0},
    "method": {
        "name": "lora",
        "targets": "q,v",
        "rank": 8,
        "alpha": 8.0,
        "dropout": 0.0,
        "init": "kaiming_uniform",
        "train": "head/.*",
    },
    "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
    "train": {"num_epochs": 2.0, "eval_every_steps": 0, "log_every_steps": 10},
}
ADAPTER_COUNTS = {"head": 0, "bitfit": 30_000, "full": 22_565_376}


def _write_run(workdir: Path, name: str, **options) -> Path:
    """Writes one cell and returns its folder.

    Options: finished, settings ({"method.rank": 4}), loss and correct (N,) test scores, index,
    validation_loss, card (keys to replace), num_steps, stopped.
    """
    cell = workdir / "cells" / name
    cell.mkdir(parents=True)
    config = copy.deepcopy(CONFIG)
    for path, value in options.get("settings", {}).items():
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    num_steps = options.get("num_steps", 100)
    correct = np.asarray(options.get("correct", [True, False, True, True]))
    loss = np.asarray(options.get("loss", np.where(correct, 0.3, 1.2)), np.float32)
    index = np.asarray(options.get("index", np.arange(len(correct))))
    validation_loss = options.get("validation_loss", 0.5)
    method = config["method"]
    adapter = ADAPTER_COUNTS.get(
        method["name"], 4608 * method["rank"] * (4 if method["targets"] == "all-linear" else 1)
    )
    (cell / "config.json").write_text(json.dumps(config))
    with open(cell / "metrics.jsonl", "w") as file:
        for step in range(0, num_steps + 1, max(1, num_steps // 40)):
            noise = 0.04 * np.sin(7.3 * step + 11 * config["seed"])
            value = float(validation_loss) - 0.08 + 0.3 * np.exp(-6 * step / num_steps) + noise
            entry = {"step": step, "split": "train", "loss": value, "lr": 1e-3}
            file.write(json.dumps(entry) + "\n")
        for step in range(0, num_steps + 1, max(1, num_steps // 8)):
            value = float(validation_loss) + 0.2 * np.exp(-8 * step / num_steps)
            value += 0.04 * max(0, step / num_steps - 0.75)
            entry = {"step": step, "split": "validation", "loss": value, "accuracy": 0.7}
            file.write(json.dumps(entry) + "\n")
    if not options.get("finished", True):
        return cell
    card = card_json(
        config=config,
        config_file="experiments/reviews_minilm.py:lora",
        config_hash=f"{zlib.crc32(name.encode()):08x}",
        seeds={"seed": config["seed"]},
        commit="0123456789abcdef+dirty",
        counts={"adapter": adapter, "head": 770, "total": 770 + adapter},
        metrics={
            "train": {"loss": 0.4},
            "validation": {"loss": validation_loss, "accuracy": 0.7, "best_step": 75},
            "test": {
                "loss": float(loss.mean(dtype=np.float64)),
                "accuracy": float(correct.mean()),
                "n": len(correct),
            },
            "stopped": options.get("stopped", "validation stopped improving"),
            "steps": num_steps,
            "adapter_bytes": 4 * adapter + 900,
        },
    )
    card.update(options.get("card", {}))
    (cell / "card.json").write_text(json.dumps(card))
    labels = np.arange(len(correct), dtype=np.int32) % 2
    np.savez(
        cell / "test_predictions.npz",
        loss=loss,
        correct=correct,
        label=labels,
        index=index.astype(np.int64),
    )
    return cell


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Writes one cell: see `_write_run`."""
    return _write_run


def _write_study(workdir: Path, *, num_examples=400, seeds=(0, 1, 2), rates=(1.0,)) -> Path:
    """Writes head-only, LoRA (three kinds) and full fine-tuning over seeds and learning rates.

    Examples share a difficulty, so the scores of different methods are correlated.
    """
    difficulty = np.random.default_rng(7).normal(size=num_examples)
    kinds = {
        "head": ({"method.name": "head"}, 0.73, 3e-3),
        "lora-qv-r1": ({"method.rank": 1}, 0.79, 1e-3),
        "lora-qv-r8": ({}, 0.80, 1e-3),
        "lora-all-r8": ({"method.targets": "all-linear"}, 0.815, 1e-3),
        "full": ({"method.name": "full"}, 0.82, 5e-5),
    }
    for kind, (settings, accuracy, rate) in kinds.items():
        cut = np.quantile(difficulty, accuracy)
        for factor in rates:
            off = abs(np.log(factor)) ** 2 / 40
            for seed in seeds:
                noise = np.random.default_rng([seed, len(kind)]).normal(size=num_examples)
                margin = cut - difficulty + 0.35 * noise - 0.3 * off
                name = f"{kind}-s{seed}" + (f"-x{factor:g}" if len(rates) > 1 else "")
                diverged = kind == "full" and factor > 5
                _write_run(
                    workdir,
                    name,
                    settings={**settings, "seed": seed, "optimizer.lr": rate * factor},
                    correct=margin > 0,
                    loss=np.log1p(np.exp(-1.6 * margin)),
                    validation_loss=float("nan")
                    if diverged
                    else 1.16 - 0.9 * accuracy + off + 0.004 * seed,
                    num_steps=532 if kind != "full" else 400,
                    stopped="budget of 532 steps ended"
                    if kind == "head"
                    else "validation stopped improving",
                )
    return workdir


@pytest.fixture
def write_study() -> Callable[..., Path]:
    """Writes a working folder of several methods: see `_write_study`."""
    return _write_study
