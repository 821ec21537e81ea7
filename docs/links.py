"""Checks the built site: `python links.py SITE`. Every link, picture, script and anchor is there.

Nothing that a page loads may be on another machine; links to other sites are counted, not followed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}
NOT_LOADED = {"canonical", "prev", "next", "preconnect"}


class Page(HTMLParser):
    """What one page links and loads, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        url = found.get(LOADED.get(tag, ""))
        if url and found.get("rel") not in NOT_LOADED:
            self.loaded.append(url)


def problems_of(site: Path) -> list[str]:
    """One line for each link that leads nowhere, and each thing loaded from elsewhere."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site)
        outside = [url for url in page.loaded if _is_elsewhere(url)]
        problems += [f"{name} loads {url} from elsewhere" for url in outside]
        for url in [*page.links, *page.loaded]:
            if not _is_elsewhere(url) and not url.startswith("data:"):
                problems += [f"{name}: {why}" for why in _broken(url, path, pages)]
    return problems


def _is_elsewhere(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "mailto")


def _broken(url: str, path: Path, pages: dict[Path, Page]) -> list[str]:
    parts = urlsplit(url)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return [f"{url} is not there"]
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return [f"{url}: no such anchor"]
    return []


def main(site: str) -> int:
    found = problems_of(Path(site).resolve())
    print("\n".join(found) or f"the links of {site} are all there")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
