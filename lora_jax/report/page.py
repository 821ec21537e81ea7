"""One self-contained page for a working folder's runs; it opens as a file, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from lora_jax.io.atomic import write_text
from lora_jax.io.paths import at_home
from lora_jax.report.details import reproduction, run_details, setting_line, what_was_run
from lora_jax.report.figures import draw_figures
from lora_jax.report.groups import BASIN_MARGIN
from lora_jax.report.html import (
    html_figure,
    html_leads,
    html_note,
    html_page,
    html_table,
    html_warnings,
    page_path,
)
from lora_jax.report.quantities import count_text, number_text, rate_text
from lora_jax.report.rendering import columns, to_csv, to_latex, to_markdown
from lora_jax.report.runs import finished_runs, read_runs
from lora_jax.report.tables import Row, Summary, score_names, summarise


def write_report(
    folder, out=None, *, summary: Summary | None = None, beside: Beside | None = None
) -> Path:
    """Writes report.html, and table.md, .tex and .csv next to it; returns the page's path.

    Args:
      folder: a training run's working folder (holding cells/*).
      out: where the page goes: a path that ends in .html, or a folder; `folder` by default.
      summary: that of the folder's runs, where the caller has it: the bootstrap takes seconds.
      beside: other runs whose table is shown after, labelled as theirs.

    Raises:
      RequestError: no runs there, a malformed file of a run, or a place that cannot be written.
    """
    folder = at_home(folder)
    summary = summary or summarise(read_runs(folder))
    out = page_path(folder if out is None else out, "report.html")
    write_text(out, to_page(summary, folder, beside))
    for kind, text_of in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
        write_text(out.with_name(f"table.{kind}"), text_of(summary))
    return out


def write_figures(summary: Summary, folder) -> list[Path]:
    """Writes each figure of the page as a file of its own, `folder`/NAME.svg; returns the paths."""
    paths = []
    for drawing in draw_figures(summary):
        paths.append(at_home(folder) / f"{drawing.name}.svg")
        write_text(paths[-1], drawing.svg)
    return paths


@dataclass(frozen=True)
class Beside:
    """Other runs, shown after a report's own: earlier, longer, or on another machine."""

    folder: Path
    summary: Summary

    @property
    def label(self) -> str:
        """What tells these runs from the report's own, in one line."""
        done = sum(run.finished for run in self.summary.runs)
        return f"{done} other runs, kept in {self.folder}; not part of those above"


def to_page(summary: Summary, folder, beside: Beside | None = None) -> str:
    """The page as HTML; everything that came from outside is escaped."""
    name = Path(folder).resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        *html_leads(headline(summary)),
        f'<p class="quiet">{escape(setting_line(summary.runs))} <a href="#what">in full</a></p>',
        html_warnings(summary.warnings),
        '<h2 id="table">Results</h2>' if summary.rows else "",
        _table(summary),
        _reading_notes(summary),
        _beside(beside),
        '<h2 id="figures">Figures</h2>' if summary.rows else "",
        *(
            html_figure(drawing) + (_rates(summary) if drawing.name == "rates" else "")
            for drawing in draw_figures(summary)
        ),
        '<h2 id="what">What was run</h2>',
        what_was_run(summary.runs),
        '<h2 id="runs">Runs</h2>',
        *(run_details(run) for run in finished_runs(summary.runs)),
        _unfinished(summary),
        '<h2 id="reproduce">Reproduce</h2>',
        reproduction(summary.runs, folder),
        '<footer class="quiet">Written by lora-jax. This file holds all it shows and asks nothing '
        "of the network; table.md, table.tex and table.csv next to it hold the table.</footer>",
    ]
    return html_page(f"{name} · lora-jax report", parts)


def headline(summary: Summary) -> list[str]:
    """What was found in two or three sentences: the best adapter against its references.

    The adapter is the one with the best validation loss; the test split chooses nothing.
    """
    done = sum(run.finished for run in summary.runs)
    methods, rows = len(summary.rows), summary.rows
    runs = f"{done} finished run{'' if done == 1 else 's'}"
    if not rows:
        return [f"No run has finished yet; {len(summary.unfinished)} under way or cut short."]
    lines = [f"{methods} method{'' if methods == 1 else 's'}, {runs}."]
    adapters = [row for row in rows if row.method not in ("full", "head")]
    if not adapters:
        return lines
    best = min(adapters, key=lambda row: row.validation_loss)
    share = ""
    if best.versus["full"]:  # so full fine-tuning of the same weights is among the rows
        most = max(row.adapter_count for row in rows if row.method == "full")
        share = f" ({100 * best.adapter_count / max(1, most):.2g}% of what full fine-tuning trains)"
    lines.append(
        f"{best.label}, the adapter with the best validation loss, trains "
        f"{count_text(best.adapter_count)} parameters{share} besides the head, and "
        f"reaches {number_text(100 * best.test_accuracy, '{:.1f}')}% "
        f"test {score_names(rows).accuracy}"
        f"{_compared(best)}."
    )
    return lines


def _compared(row: Row) -> str:
    names = {"head": "the frozen encoder with a trained head", "full": "full fine-tuning"}
    clauses = []
    for reference, name in names.items():
        if difference := row.versus[reference]:
            points = difference.scaled(100)
            side = "above" if points.estimate >= 0 else "below"
            low, high = (number_text(value, "{:+.1f}") for value in (points.low, points.high))
            clauses.append(f"{abs(points.estimate):.1f} points {side} {name} [{low}, {high}]")
    return f": {' and '.join(clauses)}" if clauses else ""


def _beside(beside: Beside | None) -> str:
    if beside is None:
        return ""
    return "\n".join(
        [
            f'<h2 id="beside">For comparison: {escape(beside.folder.resolve().name)}</h2>',
            html_note(f"{beside.label}: {setting_line(beside.summary.runs)}"),
            html_warnings(beside.summary.warnings),
            _table(beside.summary),
            _reading_notes(beside.summary),
        ]
    )


def _table(summary: Summary) -> str:
    if not summary.rows:
        return ""
    shown = columns(summary)
    rows = [[column.cell(row) for column in shown] for row in summary.rows]
    texts = [number for number, column in enumerate(shown) if not column.numeric]
    return html_table("results", [column.heading for column in shown], rows, texts)


def _reading_notes(summary: Summary) -> str:
    if not summary.rows:
        return ""
    counts = sorted({row.num_examples for row in summary.rows if row.num_examples})
    examples = " or ".join(f"{count:,}" for count in counts) or "the"
    sentences = [
        f"Brackets are 95% percentile intervals from {summary.num_resamples:,} bootstrap resamples "
        f"of {examples} test examples and of the seeds, where there are several.",
        "A difference is paired: both methods are scored on the same resampled examples, so it can "
        "be sure where two intervals overlap; one that holds 0 leaves open which is better.",
        "Loss is the primary measure, accuracy the second.",
    ]
    if any(max(row.cells) > 1 for row in summary.rows):
        sentences.append(
            "Cells that trained as one program have an equal share of its time while they were at "
            "work; memory is the whole program's, by XLA's count."
        )
    if any(len(row.seeds) == 1 for row in summary.rows):
        sentences.append(
            "A row with one seed says nothing of how much another seed would change it."
        )
    if any(1 < len(row.seeds) < 10 for row in summary.rows):
        sentences.append("With few seeds, their share of an interval is somewhat too narrow.")
    return html_note(" ".join(sentences))


def _rates(summary: Summary) -> str:
    rows = []
    for basin in summary.basins:
        width = f"{rate_text(basin.low)} to {rate_text(basin.high)}"
        if basin.low > 0:
            width += f" (×{basin.high / basin.low:.3g})"
        tried, loss = map(rate_text, basin.rates), number_text(min(basin.losses), "{:.4f}")
        rows.append((basin.label, ", ".join(tried), rate_text(basin.chosen), loss, width))
    width = f"within {BASIN_MARGIN:g} nats of it"
    head = ("method", "rates tried", "chosen", "validation loss", width)
    return html_table("learning rates", head, rows, texts=(0, 1))


def _unfinished(summary: Summary) -> str:
    if not summary.unfinished:
        return ""
    items = "".join(
        f"<li><b>{escape(run.name)}</b>: {escape(run.status)}</li>" for run in summary.unfinished
    )
    return (
        "<h3>Unfinished</h3><p>Without a card yet: under way, or ended before their time. They are "
        f"not in the table.</p><ul>{items}</ul>"
    )
