"""The table as Markdown: a verdict a cell, and below it what the verdicts leave out."""

from __future__ import annotations

from collections import Counter

from experiments.peers.judge import TOLERANCE, VERDICTS

MARKS = {"silently wrong": "**silently wrong**", "not expressible": "—"}
LEGEND = """
A cell is *low-rank* (equal to merging W + ΔW, which is never formed), *materialised* (equal, but ΔW
or W + ΔW is formed), *error* (it raises), *silently wrong* (it runs without a warning and differs,
or a kernel that the rule names has no adapter) or — (not expressible). † The model was rewritten
for the tool: its layers, or `quaxify` around each product, by hand; the kernel is still used as the
row says. Of the ways tried, the best counts; `attachment.json` has all of them.
"""


def markdown(record: dict, cases) -> str:
    """The whole page; `record` is what `attachment.json` holds."""
    columns = record["columns"]
    notes = _Notes()
    lines = ["# Where adapters can be attached", "", f"`{record['command']}`, commit"]
    lines[-1] += f" {record['commit']}."
    lines += [_versions(column) for column in columns]
    lines += [LEGEND, _row(["construct", *(column["tool"] for column in columns)])]
    lines += [_row(["---"] * (len(columns) + 1))]
    group = None
    for case in cases:
        if case.group != group:
            group = case.group
            lines.append(_row([f"**{group}**", *[""] * len(columns)]))
        cells = [_cell(column["cells"][case.name], case, notes) for column in columns]
        lines.append(_row([case.title, *cells]))
    lines += ["", _counts(columns, len(cases)), "", _precision(columns, cases), "", *notes.lines()]
    return "\n".join(lines).rstrip() + "\n"


class _Notes:
    """Footnotes, numbered as they come; the same text is said once."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        number = self.numbers.setdefault(text, len(self.numbers) + 1)
        return f"<sup>{number}</sup>"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for text, number in self.numbers.items()]


def _row(items) -> str:
    return "| " + " | ".join(items) + " |"


def _versions(column: dict) -> str:
    told = ", ".join(f"{name} {version}" for name, version in column["versions"].items())
    return f"- {column['tool']}: {told}"


def _cell(cell: dict, case, notes: _Notes) -> str:
    word = MARKS.get(cell["verdict"], cell["verdict"]) + "†" * cell["rewritten"]
    text = _footnote(cell, case)
    return f"{word} {notes.mark(text)}" if text else word


def _footnote(cell: dict, case) -> str:
    """What the word does not say: the message, how it was reached, how other ways ended."""
    parts = [_escaped(cell["message"])] if cell["message"] else []
    options = cell["way"].partition(", ")[2]
    if options and cell["verdict"] in ("low-rank", "materialised"):
        parts.append(f"with {options}")
    if cell["dtype"] not in ("", case.dtype):
        parts.append(f"in {cell['dtype']}")
    parts += [_escaped(text) for text in cell["warned"] if cell["verdict"] == "silently wrong"]
    if cell["rewritten"]:
        parts += _as_it_is(cell)
    if cell["verdict"] in ("error", "low-rank"):
        parts += _worse(cell)
    return "; ".join(dict.fromkeys(parts))


def _as_it_is(cell: dict) -> list[str]:
    """How the best way ended that does not rewrite the model."""
    plain = [tried for tried in cell["tried"] if not tried["rewritten"]]
    if not plain:
        return []
    best = min(plain, key=lambda tried: VERDICTS.index(tried["verdict"]))
    return [_told("the model as it is", best)]


def _worse(cell: dict) -> list[str]:
    """A way that went silently wrong, where another did not."""
    wrong = [tried for tried in cell["tried"] if tried["verdict"] == "silently wrong"]
    if not wrong:
        return []
    # Numbers before absences: what differs tells more than what is missing.
    worst = max(wrong, key=lambda tried: tried["difference"] or 0.0)
    return [_told(worst["way"], worst)]


def _told(way: str, outcome: dict) -> str:
    message = f": {_escaped(outcome['message'])}" if outcome["message"] else ""
    return f"{way}: {outcome['verdict']}{message}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _counts(columns, total: int) -> str:
    told = []
    for column in columns:
        counts = Counter(cell["verdict"] for cell in column["cells"].values())
        counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        told.append(f"{column['tool']}: {counted}")
    return f"Of {total}: " + ". ".join(told) + "."


def _precision(columns, cases) -> str:
    """The largest difference of the cells that are right."""
    worst: dict[str, float] = {}
    for column in columns:
        for case in cases:
            cell = column["cells"][case.name]
            if cell["verdict"] in ("low-rank", "materialised"):
                worst[cell["dtype"]] = max(worst.get(cell["dtype"], 0.0), cell["difference"])
    told = [
        f"{difference:.1g} in {dtype} (allowed: {TOLERANCE[dtype]:g})"
        for dtype, difference in worst.items()
    ]
    return "Largest difference of the cells that are right: " + ", ".join(told) + "."
