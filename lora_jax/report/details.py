"""The page's account of what was run: model, data, versions, each run's settings and command."""

import json
import shlex
from html import escape
from pathlib import Path

import numpy as np

from lora_jax.report.commands import command
from lora_jax.report.quantities import bytes_text, number_text, seconds_text
from lora_jax.report.runs import FinishedRun, Run, finished_runs
from lora_jax.settings.settings import hashable_settings


def setting_line(runs: tuple[Run, ...]) -> str:
    """Model, data, device and commit in one line."""
    finished = finished_runs(runs)
    commit = _values(finished, _short_commit)
    model, data, device = _values(runs, _model), _values(runs, _data), _values(finished, _device)
    return ", ".join(filter(None, (model, data, device, commit and f"commit {commit}")))


def what_was_run(runs: tuple[Run, ...]) -> str:
    """Model, data, hashes, device, commit and versions; where runs differ, each value once."""
    finished = finished_runs(runs)
    entries = {
        "model": _values(runs, _model),
        "base weights": _values(finished, lambda run: f"sha256 {run.card.base_hash}"),
        "data": _values(runs, _data),
        "data hash": _values(finished, lambda run: run.card.data_hash),
        "test examples": _values(finished, _test_examples),
        "device": _values(finished, _device),
        "commit": _values(finished, lambda run: run.card.commit),
        "versions": _values(finished, lambda run: _plain(run.card.versions)),
    }
    return _definitions(entries)


def run_details(run: FinishedRun) -> str:
    """A finished run, folded: how it ended, its numbers, its settings, its command."""
    card = run.card
    metrics, counts, test = card.metrics, card.counts, card.metrics.test
    best = metrics.validation
    entries = {
        "how it ended": f"{metrics.stopped}, after {metrics.steps} steps",
        "best validation loss": f"{number_text(best.loss, '{:.4f}')} at step {best.best_step}",
        "test loss": number_text(test.loss, "{:.4f}"),
        "test accuracy": number_text(100 * test.accuracy, "{:.2f}%"),
        "test tokens": "" if test.tokens is None else f"{test.tokens:,}",
        **{f"test {name}": number_text(x, "{:.4f}") for name, x in test.task_metrics.items()},
        "trained parameters": f"{counts.adapter:,} adapter + {counts.head:,} head",
        "adapter file": bytes_text(metrics.adapter_bytes),
        "time": _plain({name: _seconds(value) for name, value in card.seconds.to_json().items()}),
        "seeds": _plain(card.seeds),
        "device": _device(run),
        "program": json.dumps(card.program.to_json()),
        "commit": card.commit,
        "config_hash": card.config_hash,
        "base_hash": card.base_hash,
        "data_hash": card.data_hash,
    }
    accuracy = number_text(100 * test.accuracy, "{:.1f}%")
    config = json.dumps(run.config, indent=2, sort_keys=True)
    if (text := command(run)) is not None:
        how = f"<p>Its command:</p><pre>{escape(text)}</pre>"
    else:
        how = (
            "<p>Its command is not known: the card names no config file, and no config in "
            "experiments/ has these settings.</p>"
        )
    return (
        f"<details><summary><b>{escape(run.name)}</b><span>{escape(accuracy)}</span>"
        f"<span>{escape(run.status)}</span></summary>{_definitions(entries)}"
        f"<p>Its settings:</p><pre>{escape(config)}</pre>{how}</details>"
    )


def reproduction(runs: tuple[Run, ...], folder) -> str:
    """Commands for the commit and this page; each run's own command is in its details."""
    commits = {run.card.commit for run in finished_runs(runs)} - {"", "unknown"}
    edited = [commit for commit in commits if commit.endswith("+dirty")]
    lines = [
        f"git checkout {shlex.quote(commit)}"
        for commit in sorted({commit.removesuffix("+dirty") for commit in commits})
    ]
    lines.append(f"lora-jax report {shlex.quote(str(Path(folder)))}")
    several = " (runs were made at several commits: check out each run's own)"
    return (
        f"<p>This page, from the runs{several if len(commits) > 1 else ''}:</p>"
        f"<pre>{escape(chr(10).join(lines))}</pre>"
        "<p>A run: the command at the end of its details above.</p>"
        + ("<p>Runs marked +dirty were made with uncommitted changes.</p>" if edited else "")
    )


def _definitions(entries: dict[str, str]) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in entries.items()
        if value
    )
    return f"<dl>{items}</dl>" if items else ""


def _values(runs, read) -> str:
    """What `read` gives for the runs, each distinct value once."""
    return "; ".join(dict.fromkeys(filter(None, (read(run) for run in runs))))


def _setting(run: Run, key: str) -> str:
    value = hashable_settings(run.config).get(key)
    return "" if value is None else str(value)


def _model(run: Run) -> str:
    return _setting(run, "model.name")


def _data(run: Run) -> str:
    source, path = _setting(run, "data.source"), _setting(run, "data.path")
    limit = _setting(run, "data.limit")
    text = f"{source} ({path})" if path else source
    return f"{text}, first {limit} training examples" if limit not in ("", "0") else text


def _test_examples(run: FinishedRun) -> str:
    if run.predictions is None:
        return ""
    predictions = run.predictions
    number = f"{len(predictions.index):,}"
    if np.any(predictions.weight != 1):
        prompts = len(np.unique(predictions.label))
        tokens = int(predictions.weight.sum())
        return (
            f"{number} of {prompts:,} prompts; loss and accuracy are means over their completions' "
            f"{tokens:,} tokens"
        )
    if np.issubdtype(predictions.label.dtype, np.floating):
        return number
    labels, counts = np.unique(predictions.label, return_counts=True)
    if len(labels) != 2:
        return f"{number}, {len(labels)} labels"
    return f"{number}, {100 * counts[0] / counts.sum():.1f}% of them label {labels[0]}"


def _short_commit(run: FinishedRun) -> str:
    commit = run.card.commit
    return commit[:12] + ("+dirty" if commit.endswith("+dirty") else "")


def _device(run: FinishedRun) -> str:
    device = run.card.device
    if "kind" not in device:
        return _plain(device)
    count = f"{device['count']} × " if device.get("count", 1) != 1 else ""
    threads = f"{device['threads']} threads" if device.get("threads") else ""
    machine = _plain(device.get("machine"))
    return ", ".join(filter(None, [f"{count}{_plain(device['kind'])}", threads, machine]))


def _seconds(value) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{1000 * value:.0f} ms" if 0 < value < 1 else seconds_text(value)


def _plain(value) -> str:
    """A card's value as one line of text."""
    if isinstance(value, dict):
        value = [f"{key} {_plain(item)}" for key, item in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "" if value is None else str(value)
