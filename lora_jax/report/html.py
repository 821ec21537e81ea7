"""What every page of this project shares: one file, which asks nothing of any network."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.report.drawing import Drawing

# Forbids the page every request, so that it shows the same here, offline and in ten years.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page_path(out: str | os.PathLike, name: str = "analysis.html") -> Path:
    """Where the page goes: `out` if it ends in .html, else a file of that name in that folder.

    Raises `RequestError` for a place that cannot be written, before any work is done for it.
    """
    out = at_home(out)
    if out.suffix.lower() not in (".html", ".htm"):
        if out.exists() and not out.is_dir():
            raise RequestError(f"{out} is a file; give a folder, or a path that ends in .html")
        out = out / name
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise RequestError(f"{out} cannot be written; give a folder of yours with --out")
    return out


def html_page(title: str, parts: Sequence[str]) -> str:
    """A whole page of the parts that are not empty; they are HTML already, `title` is text."""
    style = files("lora_jax.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def html_warnings(lines: Sequence[str]) -> str:
    """Lines of text that a reader must not miss; nothing where there are none."""
    if not lines:
        return ""
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="warnings" role="note">{paragraphs}</div>'


def html_table(
    label: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str | tuple[str, str]]],
    texts: Collection[int] = (0,),
) -> str:
    """A table that scrolls sideways where it must; the first column says what a row is.

    A cell is a text, or a text and a detail in small print; `texts` are the columns of words.
    """
    kinds = ["text" if number in texts else "number" for number in range(len(head))]
    heading = "".join(
        f'<th scope="col" class="{kind}">{escape(text)}</th>'
        for kind, text in zip(kinds, head, strict=True)
    )
    lines = []
    for row in rows:
        line = ""
        for kind, cell in zip(kinds, row, strict=True):
            value, detail = (cell, "") if isinstance(cell, str) else cell
            content = escape(value) + (f"<small>{escape(detail)}</small>" if detail else "")
            tag, scope = ("td", "") if line else ("th", ' scope="row"')
            line += f'<{tag}{scope} class="{kind}">{content}</{tag}>'
        lines.append(f"<tr>{line}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{heading}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def html_note(text: str) -> str:
    """A paragraph of text beneath what it explains."""
    return f'<p class="quiet">{escape(text)}</p>'


def html_leads(lines: Sequence[str]) -> list[str]:
    """The sentences that a page begins with."""
    return [f'<p class="lead">{escape(line)}</p>' for line in lines]


def html_figure(drawing: Drawing) -> str:
    """A figure with its title and caption."""
    return (
        f'<figure id="figure-{drawing.name}"><h3>{escape(drawing.title)}</h3>'
        f'<div class="picture">{drawing.svg}</div>'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )
