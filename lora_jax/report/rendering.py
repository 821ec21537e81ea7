"""The same rows for a terminal, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from lora_jax.io.untrusted import printable
from lora_jax.report.quantities import (
    ABSENT,
    MINUS,
    bytes_text,
    count_text,
    interval_text,
    number_text,
    rate_text,
    seconds_text,
)
from lora_jax.report.statistics import Interval
from lora_jax.report.tables import Row, Summary, score_names


@dataclass(frozen=True)
class Column:
    """One column for readers: `cell(row)` gives the value and a detail in small print."""

    heading: str
    cell: Callable[[Row], tuple[str, str]]
    numeric: bool = True


def columns(summary: Summary) -> list[Column]:
    """The columns of the full table; a difference has one only where its reference was run."""
    return [
        Column("method", _method, numeric=False),
        Column("targets", lambda row: (row.targets or ABSENT, ""), numeric=False),
        Column("rank", lambda row: (ABSENT if row.rank is None else str(row.rank), "")),
        Column("learning rate", _rate),
        Column("seeds", lambda row: (str(len(row.seeds)), "")),
        Column("trained: adapter + head", _trained),
        Column("adapter file", lambda row: (bytes_text(row.adapter_bytes), "")),
        *_measured(
            summary,
            lora="loss vs LoRA, nats",
            accuracy=f"test {score_names(summary.rows).accuracy}, %",
            full="accuracy vs full, points",
            head="accuracy vs head only, points",
        ),
        Column("steps and time, and why it ended", _ended_in, numeric=False),
        *([Column("memory", _memory)] if any(row.memory_bytes for row in summary.rows) else []),
    ]


def _measured(summary: Summary, *, lora: str, accuracy: str, **versus: str) -> list[Column]:
    """What was measured on the test split, under these headings."""
    found = [Column("test loss", lambda row: interval_text(*row.score("loss"), "{:.3f}"))]
    if any(row.loss_vs_lora for row in summary.rows):
        found.append(Column(lora, lambda row: _difference(row.loss_vs_lora, "{:+.3f}")))
    found.append(Column(accuracy, lambda row: interval_text(*row.score("accuracy"), "{:.1f}")))
    found += [Column(f"test {name}", _metric(name)) for name in _metric_names(summary)]
    return found + [Column(versus[name], _versus(name)) for name in summary.references]


def to_terminal(summary: Summary) -> Table:
    """A `rich` table that fits some 100 columns: one line of values, one of intervals, per row."""
    accuracy = f"{score_names(summary.rows).accuracy} %"
    short = [
        Column("method, rate", _short_method, numeric=False),
        Column(
            "trained", lambda row: (count_text(row.adapter_count), bytes_text(row.adapter_bytes))
        ),
        *_measured(summary, lora="vs LoRA", accuracy=accuracy, full="vs full", head="vs head"),
        Column("steps, time", _ended_briefly, numeric=False),
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in short:
        side = "right" if column.numeric else "left"
        table.add_column(column.heading, justify=side, no_wrap=column.numeric)
    for row in summary.rows:
        cells = (column.cell(row) for column in short)
        # Text, not markup: a setting such as "[red]" is printed, not obeyed.
        table.add_row(
            *(
                Text.assemble(printable(value), (printable(detail and f"\n{detail}"), "dim"))
                for value, detail in cells
            )
        )
    return table


def to_markdown(summary: Summary) -> str:
    """A Markdown table, intervals in the cells."""
    shown = columns(summary)
    lines = [
        "| " + " | ".join(column.heading for column in shown) + " |",
        "|" + "|".join(" ---: " if column.numeric else " :--- " for column in shown) + "|",
    ]
    for row in summary.rows:
        cells = (
            (" " if column.numeric else ", ").join(filter(None, column.cell(row)))
            for column in shown
        )
        lines.append("| " + " | ".join(_escape_markdown(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def to_latex(summary: Summary) -> str:
    """A LaTeX tabular (needs the booktabs package), intervals small after the values."""
    shown = columns(summary)
    lines = [
        rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in shown)}}}",
        r"\toprule",
        " & ".join(_escape_latex(column.heading) for column in shown) + r" \\",
        r"\midrule",
    ]
    for row in summary.rows:
        cells = []
        for value, detail in (column.cell(row) for column in shown):
            small = rf" {{\scriptsize {_escape_latex(detail)}}}" if detail else ""
            cells.append(_escape_latex(value) + small)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_records(summary: Summary) -> list[dict]:
    """One flat record per row, in the units of `Row`; what is absent or not finite is None."""
    records, names = [], _metric_names(summary)
    for row in summary.rows:
        record = {
            "label": row.label,
            "method": row.method,
            "targets": row.targets,
            "rank": row.rank,
            "lr": row.lr,
            "rates_tried": row.rates_tried,
            "seeds": " ".join(str(seed) for seed in row.seeds),
            "adapter_parameters": row.adapter_count,
            "head_parameters": row.head_count,
            "adapter_bytes": row.adapter_bytes,
            "validation_loss": row.validation_loss,
            **_interval_record("test_loss", row.test_loss, row.loss),
            **_interval_record("test_accuracy", row.test_accuracy, row.accuracy),
            **_interval_record("loss_vs_lora", None, row.loss_vs_lora),
            **_interval_record("accuracy_vs_full", None, row.versus["full"]),
            **_interval_record("accuracy_vs_head", None, row.versus["head"]),
            **{f"test_{name}": row.task_metrics.get(name) for name in names},
            "test_examples": row.num_examples,
            "steps": " ".join(str(steps) for steps in row.steps),
            "stopped": "; ".join(dict.fromkeys(row.stopped)),
            "seconds": row.seconds,
            "memory_bytes": row.memory_bytes,
            "cells_in_program": " ".join(str(count) for count in row.cells),
            "runs": " ".join(run.name for run in row.runs),
        }
        records.append({key: _finite(value) for key, value in record.items()})
    return records


def _inert(value: object) -> object:
    """A text that a spreadsheet would take for a formula, with an apostrophe before it."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def to_csv(summary: Summary) -> str:
    """The records as CSV with a heading line."""
    records = to_records(summary)
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _inert(value) for key, value in one.items()} for one in records)
    return text.getvalue()


def to_json(summary: Summary) -> str:
    """Rows, learning-rate basins, unfinished runs and warnings as one JSON object."""
    value = {
        "rows": to_records(summary),
        "basins": [
            {
                "label": basin.label,
                "rates": basin.rates,
                "validation_losses": [_finite(loss) for loss in basin.losses],
                "chosen": basin.chosen,
                "within_margin": [basin.low, basin.high],
            }
            for basin in summary.basins
        ],
        "unfinished": [{"name": run.name, "step": run.last_step} for run in summary.unfinished],
        "warnings": summary.warnings,
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _method(row: Row) -> tuple[str, str]:
    return row.method_name, ", ".join(f"{key}={value}" for key, value in row.differing.items())


def _short_method(row: Row) -> tuple[str, str]:
    seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"
    return row.label, f"{rate_text(row.lr)}, {seeds}"


def _rate(row: Row) -> tuple[str, str]:
    return rate_text(row.lr), f"best of {row.rates_tried}" if row.rates_tried > 1 else ""


def _trained(row: Row) -> tuple[str, str]:
    return count_text(row.adapter_count), f"+ {count_text(row.head_count)}"


def _metric_names(summary: Summary) -> list[str]:
    """The metrics that a data set has of its own; means over seeds."""
    return list(dict.fromkeys(name for row in summary.rows for name in row.task_metrics))


def _metric(name: str) -> Callable[[Row], tuple[str, str]]:
    def cell(row: Row) -> tuple[str, str]:
        value = row.task_metrics.get(name)
        return ABSENT if value is None else number_text(value, "{:.3f}"), ""

    return cell


def _versus(name: str) -> Callable[[Row], tuple[str, str]]:
    def cell(row: Row) -> tuple[str, str]:
        difference = row.versus[name]
        return _difference(difference and difference.scaled(100), "{:+.1f}")

    return cell


def _difference(found: Interval | None, form: str) -> tuple[str, str]:
    return interval_text(found.estimate, found, form) if found else (ABSENT, "")


def _ended(row: Row) -> tuple[str, str]:
    low, high = min(row.steps), max(row.steps)
    reasons = dict.fromkeys(row.stopped)
    if len(reasons) > 1:
        reasons = [f"{reason} ({row.stopped.count(reason)})" for reason in reasons]
    return (str(low) if low == high else f"{low}\N{EN DASH}{high}"), "; ".join(reasons)


def _ended_in(row: Row) -> tuple[str, str]:
    steps, reasons = _ended(row)
    return f"{steps} in {seconds_text(row.seconds)}", reasons


def _memory(row: Row) -> tuple[str, str]:
    most = max(row.cells)
    return bytes_text(row.memory_bytes), f"for {most} cells" if most > 1 else ""


def _ended_briefly(row: Row) -> tuple[str, str]:
    steps, reasons = _ended_in(row)
    reasons = reasons.replace("validation stopped improving", "stopped early")
    return steps, re.sub(r"budget of \d+ steps ended", "budget ended", reasons)


def _interval_record(name: str, value: float | None, interval: Interval | None) -> dict:
    return {
        name: interval.estimate if interval else value,
        f"{name}_low": interval and interval.low,
        f"{name}_high": interval and interval.high,
    }


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape_markdown(text: str) -> str:
    text = re.sub(r"([\\`*_<>|])", r"\\\1", text)
    return " ".join(text.replace("](", "]\\(").split())  # brackets alone make no link


_LATEX = {
    **{character: f"\\{character}" for character in "{}&%$#_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MINUS: "$-$",
    ABSENT: "--",
}


def _escape_latex(text: str) -> str:
    return text.translate(str.maketrans(_LATEX))
