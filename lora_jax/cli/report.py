"""`lora-jax report`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_jax.cli.parser import Parser, say

EXAMPLES = """\
Examples:
  lora-jax report runs/first
  lora-jax report runs/first --out=~/page.html
  lora-jax report runs/demo --beside=experiments/results/reviews_minilm    earlier runs, for scale
  lora-jax report runs/mine --keep=results/mine    a copy without weights, small enough to commit
  lora-jax report runs/mine --figures=paper/figures    each figure as an SVG file too

The page needs no network and no server: open it as a file. Next to it: table.md and table.csv.
Intervals are 95% bootstrap intervals over test examples, and over seeds where there are several.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("report", epilog=EXAMPLES)
    parser.add_argument("workdir", help="the folder that holds cells/")
    parser.add_argument("--out", help="an .html path or a folder (default: the workdir)")
    parser.add_argument("--beside", metavar="DIR", help="other runs, whose table is shown after")
    parser.add_argument(
        "--keep", metavar="DIR", help="copy cards, metrics and predictions there, without weights"
    )
    parser.add_argument("--figures", metavar="DIR", help="each figure as an SVG file there too")
    options = parser.parse_args(argv)

    from rich.console import Console

    from lora_jax.report.export import keep_runs
    from lora_jax.report.page import Beside, write_figures, write_report
    from lora_jax.report.rendering import to_json, to_terminal
    from lora_jax.report.runs import read_runs
    from lora_jax.report.tables import summarise

    keep, beside = options.keep, options.beside
    summary = summarise(read_runs(options.workdir))
    beside = Beside(Path(beside), summarise(read_runs(beside))) if beside else None
    kept = keep_runs(options.workdir, keep) if keep else 0
    figures = write_figures(summary, options.figures) if options.figures else []
    page = write_report(options.workdir, options.out, summary=summary, beside=beside)
    if options.json:
        found = {"page": str(page), **json.loads(to_json(summary))}
        if beside:
            found["beside"] = json.loads(to_json(beside.summary))
        if keep:
            found["kept"] = kept
        if figures:
            found["figures"] = [str(path) for path in figures]
        say(json.dumps(found))
        return 0
    # A file or a pipe has no width of its own; 80 columns would cut the table short.
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(to_terminal(summary))
    if beside:
        say(f"{beside.label}:")
        console.print(to_terminal(beside.summary))
    if keep:
        say(f"{kept} runs kept in {keep}")
    if figures:
        say(f"{len(figures)} figures in {figures[0].parent}")
    say(f"the page: {page.resolve().as_uri()}")
    return 0
