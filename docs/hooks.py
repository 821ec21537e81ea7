"""What the site's build adds to the pages: other pages of the repository, and generated lists.

A link that leaves docs/ works in the repository and in the site. A Markdown file that is linked (or
named in the nav as repo/PATH) becomes a page, and so do those that it links; a picture is copied; a
link to any other file is text.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS, REPO = "docs", "repo"
LINK = re.compile(r"(?P<start>!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\])\((?P<url>[^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"^<!-- (commands|settings|api: [\w.]+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Adds every study to the nav, after the page of all results."""
    studies = sorted((ROOT / "experiments" / "results").glob("*/README.md"))
    pages = [in_site(str(page.relative_to(ROOT))) for page in studies]
    for entry in config.nav:
        if isinstance(overview := entry.get("Results"), str):
            entry["Results"] = [overview, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and what they and the nav name outside of docs/."""
    waiting = [str(page.relative_to(ROOT)) for page in (ROOT / DOCS).rglob("*.md")]
    waiting += re.findall(rf"{REPO}/([\w./-]+)", str(config.nav))
    seen: set[str] = set()
    while waiting:
        page = waiting.pop()
        if page in seen or not (ROOT / page).is_file():
            continue
        seen.add(page)
        files.append(File.generated(config, in_site(page), abs_src_path=str(ROOT / page)))
        if page.endswith(".md"):
            waiting += linked_outside(page)
    return files


def in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    inside = path.startswith(f"{DOCS}/")
    return path.removeprefix(f"{DOCS}/") if inside else f"{REPO}/{path}"


def in_repository(source: str) -> str:
    """Where the repository has a file of the site."""
    return source.removeprefix(f"{REPO}/") if source.startswith(f"{REPO}/") else f"{DOCS}/{source}"


def linked_outside(page: str) -> list[str]:
    """Pages and pictures outside docs/ that a page of the repository links."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    targets = [target_of(page, found["url"])[0] for found in LINK.finditer(text)]
    return [path for path in targets if path and has_place(path) and not path.startswith(DOCS)]


def target_of(page: str, url: str) -> tuple[str, str]:
    """The file that a relative link means, from the top of the repository, and the anchor."""
    path, _, anchor = url.partition("#")
    if not path or ":" in path or path.startswith("/"):
        return "", anchor
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), anchor


def has_place(path: str) -> bool:
    """Whether a file of the repository is a page or a picture of the site."""
    return path.endswith((".md", ".png", ".svg")) and (ROOT / path).is_file()


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in the generated lists, and turns links to where the site has their targets."""
    markdown = MARKER.sub(lambda found: generated(found[1]), markdown)
    source = page.file.src_uri
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [turned(markdown[end : fence.start()], source), fence[0]]
        end = fence.end()
    return "".join([*parts, turned(markdown[end:], source)])


def turned(text: str, source: str) -> str:
    """The text with its links outside docs/ as those of the site."""

    def of_site(found: re.Match) -> str:
        path, anchor = target_of(in_repository(source), found["url"])
        if not path:
            return found[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links {found['url']!r}, which is not there")
        if not has_place(path):
            return found["text"]
        url = posixpath.relpath(in_site(path), posixpath.dirname(source) or ".")
        return f"{found['start']}({url}{'#' if anchor else ''}{anchor})"

    return LINK.sub(of_site, text)


def generated(what: str) -> str:
    """The Markdown that stands for a marker."""
    if what == "commands":
        return commands()
    if what == "settings":
        return settings()
    return "\n\n".join(f"::: {what[5:]}.{name}" for name in public_names(what[5:]))


def public_names(package: str) -> list[str]:
    """The functions and classes that a package of lora_jax gives, or a module of it defines."""
    found = importlib.import_module(package)
    values = {name: getattr(found, name) for name in getattr(found, "__all__", vars(found))}
    return [
        name
        for name, value in values.items()
        if callable(value)
        and getattr(value, "__module__", "").startswith(package)
        and not name.startswith("_")
    ]


def commands() -> str:
    """What each command's --help prints."""
    from lora_jax.cli.main import COMMANDS

    parts = []
    for name, about in COMMANDS.items():
        parts.append(f"## {name}\n\n{about[:1].upper()}{about[1:]}.\n\n```text\n{help_of(name)}```")
    return "\n\n".join(parts)


def help_of(command: str) -> str:
    """The help of a command, without the list of settings, which has a page."""
    from lora_jax.cli.main import main

    said, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    listed = r"^All settings with their defaults:\n(  .*\n)+\n?"
    return re.sub(listed, "", said.getvalue(), flags=re.MULTILINE)


def settings() -> str:
    """A table of each section of the settings."""
    from lora_jax.settings.described import table

    sections: dict[str, list[str]] = {}
    for row in table().splitlines()[2:]:
        name, kind, default, bounds, role, meaning = map(str.strip, row.strip("|").split(" | "))
        found = sections.setdefault(name.strip("`").partition(".")[0], [])
        found.append(f"| {name} | {default} | {meaning} | {bounds} | {kind} | {role} |")
    head = "| setting | default | meaning | range | type | role |\n|---|---|---|---|---|---|"
    lines = []
    for section, rows in sections.items():
        lines += [f"## {section}", "", '<div class="settings" markdown>', "", head, *rows, ""]
        lines += ["</div>", ""]
    return "\n".join(lines)
