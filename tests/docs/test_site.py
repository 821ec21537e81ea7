"""The site itself: it builds without a warning, its links lead somewhere, and it works in a browser
that opens its files and has no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="no mkdocs: pip install 'lora_jax[docs]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Pages with long lines or wide tables.
WIDE = (
    "index", "tutorials/own-model", "how-to/peft", "explanation/lift", "reference/settings",
    "reference/commands", "reference/api/training", "repo/experiments/index",
)  # fmt: skip
PHONE, DESK = (390, 844), (1200, 900)


def problems_of(site: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "links.py", site], capture_output=True, text=True
    )
    return done.stdout.splitlines() if done.returncode else []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built anew."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "-d", folder], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    assert problems_of(site) == []


def test_the_check_of_links_sees_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        "<h1 id=here></h1><a href='b.html#gone'></a><a href='no.html'></a><a href='#here'></a>"
        "<img src='no.png'><script src='https://example.org/x.js'></script>"
    )
    (tmp_path / "b.html").write_text("<a href='a.html#here'></a>")
    assert problems_of(tmp_path) == [
        "a.html loads https://example.org/x.js from elsewhere",
        "a.html: b.html#gone: no such anchor",
        "a.html: no.html is not there",
        "a.html: no.png is not there",
    ]


def test_pages_have_the_settings_the_commands_and_the_docstrings(site):
    settings = (site / "reference" / "settings.html").read_text()
    commands = (site / "reference" / "commands.html").read_text()
    from lora_jax.cli.main import COMMANDS
    from lora_jax.settings.schema import SETTINGS

    assert not [key for key in SETTINGS if f"<code>{key}</code>" not in settings]
    assert not [name for name in COMMANDS if f"usage: lora-jax {name} " not in commands]
    assert "taught to take adapted values" in (site / "reference/api/adapters.html").read_text()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(params=[(PHONE, "light"), (DESK, "dark")], ids=["phone, light", "desk, dark"])
def page(request, browser, site):
    """The home page, opened as a file; what went wrong on it, and on others, is looked at after."""
    (width, height), scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(120_000)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda asked: wrong.append(asked.url) if _is_remote(asked.url) else None)
    opened.goto((site / "index.html").as_uri())
    yield opened
    context.close()
    assert wrong == []


def _is_remote(url: str) -> bool:
    return not url.startswith(("file:", "data:", "about:", "blob:"))


def test_navigation_leads_to_a_page(page):
    if page.viewport_size["width"] < 1220:
        page.locator("header label[for=__drawer]").click()
        page.locator("nav.md-nav--primary label.md-nav__link", has_text="Tutorials").first.click()
    page.locator("nav.md-nav--primary a", has_text="A sweep and its report").click()
    page.wait_for_url("**/tutorials/sweep.html")
    assert page.locator("h1").inner_text().startswith("A sweep and its report")


def test_search_finds_a_word(page):
    if page.viewport_size["width"] < 960:
        page.locator("header label.md-header__button[for=__search]").click()
    page.locator("input.md-search__input").press_sequentially("jackknife")
    found = page.locator(".md-search-result__item a").first
    found.wait_for()
    assert "statistics.html" in found.get_attribute("href")
    found.click()
    page.wait_for_url("**/explanation/statistics.html*")


def test_the_copy_button_copies_the_block(page):
    page.locator(".md-code__nav button").first.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("import jax\n")


def test_no_page_is_wider_than_the_screen(page, site):
    for name in WIDE:
        page.goto((site / f"{name}.html").as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= page.viewport_size["width"], name
