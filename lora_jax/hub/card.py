"""The model card of a run, README.md on the hub: everything in it comes from the run's record."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.hub.files import PEFT_CONFIG
from lora_jax.methods.registry import title_of
from lora_jax.models.checkpoint import HEAD_FILE
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.sources import embedded_names
from lora_jax.report.cite import cite
from lora_jax.report.commands import command
from lora_jax.report.groups import group_runs
from lora_jax.report.quantities import interval_text, rate_text, seconds_text
from lora_jax.report.runs import FinishedRun, finished_runs, read_runs
from lora_jax.report.statistics import LEVEL, Interval
from lora_jax.report.tables import Row, score_names, summarise
from lora_jax.train.task import head_of

_PIPELINES = {CAUSAL_LM: "text-generation"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def model_card(folder: Path, cell: Path, repo: str, *, license: str, base: str) -> str:
    """The text of README.md for a run, with the metadata that the hub reads at its top.

    Args:
      folder: what will be pushed: PEFT's files and the record in cells/NAME.
      cell: the run where it was trained; the other runs there with its settings and other seeds
        join the intervals.
      repo: "owner/name".
      license: its short name on the hub.
      base: the base model's name.
    """
    from huggingface_hub import ModelCard

    run = _run_in(folder, cell.name)
    own, repeats = _row([run]), _repeats(cell, run)
    seeds = _row(repeats) if len(repeats) > 1 else None
    sections = [
        f"# {repo.partition('/')[2]}",
        _about(run, base),
        f"## Results\n\n{_results(own, seeds)}",
        f"## Use\n\n{_use(folder, run, repo, base)}",
        f"## Training\n\n{_training(run, base)}",
        f"## Verify\n\n{_verify(run, repo)}",
        f"## Cite\n\n```bibtex\n{cite(folder / 'cells' / run.name).strip()}\n```",
    ]
    data = _metadata(run, own, license, base)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def base_revision(base: str) -> str | None:
    """The commit of the base that huggingface_hub's cache holds; None for what is not from there.

    >>> base_revision("tiny-bert")
    """
    from huggingface_hub import try_to_load_from_cache

    if not is_on_hub(base):
        return None
    found = try_to_load_from_cache(base, "config.json")
    if not isinstance(found, str) or Path(found).parent.parent.name != "snapshots":
        return None
    return Path(found).parent.name


def _run_in(folder: Path, name: str) -> FinishedRun:
    return next(run for run in finished_runs(read_runs(folder)) if run.name == name)


def _repeats(cell: Path, run: FinishedRun) -> list[FinishedRun]:
    """The finished runs of the workdir with this run's settings, base and data, one a seed."""
    if cell.parent.name != "cells":
        return [run]
    groups, _ = group_runs(read_runs(cell.parent.parent))
    own = next((g.runs for g in groups if any(one.name == run.name for one in g.runs)), (run,))
    return list(own)


def _row(runs: Sequence[FinishedRun]) -> Row:
    (row,) = summarise(list(runs)).rows
    return row


def _metadata(run: FinishedRun, row: Row, license: str, base: str) -> Any:
    from huggingface_hub import ModelCardData

    head, on_hub = head_of(run.config["model"]), is_on_hub(base)
    return ModelCardData(
        license=license,
        library_name="peft",
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        pipeline_tag=_PIPELINES.get(head, "text-classification"),
        tags=["lora_jax", "jax", str(row.method)],
        model_name=run.name,
        eval_results=_eval_results(run, row, _PIPELINES.get(head, "text-classification")),
    )


def is_on_hub(base: str) -> bool:
    """Whether the name can be the hub's: one of `embedded_names()` is this project's own."""
    return base not in embedded_names() and _HUB_ID.fullmatch(base) is not None


def _eval_results(run: FinishedRun, row: Row, task: str) -> list[Any]:
    from huggingface_hub import EvalResult

    data = run.config["data"]
    names = score_names([row])
    scores = [("loss", names.loss, row.test_loss, row.loss)]
    scores += [("accuracy", names.accuracy, row.test_accuracy, row.accuracy)]
    scores += [(name, name, value, None) for name, value in row.task_metrics.items()]
    return [
        EvalResult(
            task_type=task, dataset_type=str(data.get("source")), dataset_name=_data_name(run),
            dataset_split="test", dataset_args={"sha256": run.card.data_hash},
            metric_type=kind, metric_name=f"test {name}", metric_value=float(value),
            metric_args=_args(run, interval),
        )
        for kind, name, value, interval in scores
        if math.isfinite(value)
    ]  # fmt: skip


def _args(run: FinishedRun, interval: Interval | None) -> dict[str, Any]:
    args: dict[str, Any] = {"examples": run.card.metrics.test.n}
    if interval is not None and math.isfinite(interval.low + interval.high):
        args[f"interval_{round(100 * LEVEL)}"] = [interval.low, interval.high]
    return args


def _data_name(run: FinishedRun) -> str:
    """The data's name, without the folders that they lie in on this machine."""
    data = run.config["data"]
    file = Path(data.get("path") or "").name
    return " ".join(filter(None, (str(data.get("source")), data.get("task"), file)))


def _about(run: FinishedRun, base: str) -> str:
    method = run.config["method"]
    shape = [f"{name} {method[name]}" for name in ("rank", "targets") if method.get(name)]
    what = ", ".join([title_of(method["name"]), *shape])
    link = f"[{base}](https://huggingface.co/{base})" if is_on_hub(base) else f"`{base}`"
    return (
        f"{what}: an adapter for {link}, trained on {_data_name(run)} with lora_jax "
        f"{run.card.versions.get('lora_jax', '')}. This page was written from the record of the "
        f"run, `cells/{run.name}/card.json`."
    )


def _results(own: Row, seeds: Row | None) -> str:
    """A table of the test scores: of this run, and over seeds where there are several."""
    names, columns = score_names([own]), [own, *([seeds] if seeds else [])]
    heads = ["on the test split", "this run"]
    heads += [f"mean of {len(seeds.runs)} seeds"] if seeds else []
    rows = [
        [names.loss, *(_score(row.test_loss, row.loss) for row in columns)],
        [names.accuracy, *(_score(row.test_accuracy, row.accuracy) for row in columns)],
    ]
    for name in own.task_metrics:
        rows.append([name, *(_score(row.task_metrics.get(name), None) for row in columns)])
    lines = [_table_row(heads), _table_row(["---"] * len(heads)), *map(_table_row, rows)]
    return "\n".join(lines) + f"\n\n{_of_intervals(own, seeds)}"


def _of_intervals(own: Row, seeds: Row | None) -> str:
    count = own.num_examples or own.runs[0].card.metrics.test.n
    if own.loss is None:
        return f"{count:,} test examples; their predictions were not kept, so there is no interval."
    over = f"over the {count:,} test examples"
    if seeds is not None:
        of_seeds = ", ".join(str(run.card.seeds.get("seed")) for run in seeds.runs)
        over += f", and over seeds ({of_seeds}) in the last column"
    return f"In brackets: {round(100 * LEVEL)}% bootstrap intervals {over}."


def _score(value: float | None, interval: Interval | None) -> str:
    return "" if value is None else " ".join(filter(None, interval_text(value, interval, "{:.4f}")))


def _table_row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _use(folder: Path, run: FinishedRun, repo: str, base: str) -> str:
    lines = [
        "```sh",
        f"lora-jax pull {repo} --out=adapter",
        f'lora-jax predict adapter/cells/{run.name} --texts "…"',
        "```",
    ]
    if (folder / HEAD_FILE).exists():
        lines += [
            "",
            f"The task's head is in `{HEAD_FILE}`: it stands on a pooling that no class of "
            f"transformers has. PEFT reads the adapter of the body from `{PEFT_CONFIG}`.",
        ]
        return "\n".join(lines)
    if not is_on_hub(base):
        return "\n".join(lines)
    causal = head_of(run.config["model"]) == CAUSAL_LM
    count = run.config["model"].get("num_labels")
    kind = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    more = "" if causal or count is None else f", num_labels={count}"
    return "\n".join(
        [
            *lines,
            "",
            "With PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f'base = {kind}.from_pretrained("{base}"{more})',
            f'model = PeftModel.from_pretrained(base, "{repo}")',
            "```",
        ]
    )


def _training(run: FinishedRun, base: str) -> str:
    card = run.card
    counts, metrics = card.counts, card.metrics
    revision = base_revision(base)
    entries = {
        "base model": f"{base}{f', revision {revision}' if revision else ''}",
        "base weights, sha256": card.base_hash,
        "data": _data_name(run),
        "data, sha256": card.data_hash,
        "trained parameters": f"{counts.adapter:,} (adapter), {counts.head:,} (head)",
        "learning rate": rate_text(run.config.get("optimizer", {}).get("lr")),
        "steps": f"{metrics.steps} ({metrics.stopped}; weights of step "
        f"{metrics.validation.best_step}, the best on validation)",
        "seeds": ", ".join(f"{name} {value}" for name, value in card.seeds.items()),
        "config, sha256": card.config_hash,
        "device": " ".join(str(card.device.get(key, "")) for key in ("count", "platform", "kind")),
        "time": seconds_text(card.seconds.total),
        "versions": ", ".join(f"{name} {value}" for name, value in sorted(card.versions.items())),
        "commit": card.commit,
    }
    rows = [_table_row(["", ""]), _table_row(["---", "---"])]
    rows += [_table_row([name, str(value).replace("|", "\\|")]) for name, value in entries.items()]
    text = command(run)
    how = (
        "The command that trains it again:\n\n```sh\n" + text + "\n```"
        if text
        else "Its command is not known: the card names no config file."
    )
    return "\n".join(rows) + f"\n\n{how}"


def _verify(run: FinishedRun, repo: str) -> str:
    count = run.card.program.K
    packed = f" It was trained with {count - 1} others in one program, which is trained again;" if (
        count > 1
    ) else ""  # fmt: skip
    alone = " `--alone` trains it without them and compares losses." if count > 1 else ""
    return (
        f"```sh\nlora-jax pull {repo} --out=adapter\nlora-jax verify adapter/cells/{run.name}\n```"
        "\n\nThis trains the run again and compares weights, predictions and scores, bit for bit "
        "on the same kind of device with the same versions. The base model and the data must be on "
        f"the machine; their hashes are checked.{packed}{alone}"
    )
