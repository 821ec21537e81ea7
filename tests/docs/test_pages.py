"""Every code block of the site's pages runs as it stands, and prints what the page shows."""

from __future__ import annotations

import re

import pytest

import lora_jax as lj
from tests.docs.blocks import PAGES, RUN, agree, blocks_of, is_slow, run_page

MARKDOWN = sorted(PAGES.rglob("*.md"))
NAMES = [str(page.relative_to(PAGES)) for page in MARKDOWN]
# Why a block may stand on a page without running: each is a thing that no test machine has.
REASONS = ("a fragment", "it installs", "it needs a TPU's compiler", "it needs a hub")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=[pytest.mark.slow] if is_slow(page) else [])
        for page, name in zip(MARKDOWN, NAMES, strict=True)
        if any(block.kind in RUN and not block.why for block in blocks_of(page))
    ],
)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch, register):
    monkeypatch.chdir(tmp_path)
    pairs = run_page(page)
    for printed, expected in pairs:
        assert agree(printed, expected), f"{printed}\n--- the page has:\n{expected}"


@pytest.mark.parametrize("page", MARKDOWN, ids=NAMES)
def test_what_is_not_run_says_why(page):
    for block in blocks_of(page):
        assert not block.why or block.why.startswith(REASONS), block
        assert block.kind in {*RUN, "text", "toml", "bibtex"}, f"{block.kind}: nothing runs it"


def test_every_public_name_is_on_one_page_of_the_reference():
    folder = PAGES / "reference" / "api"
    text = "\n".join(page.read_text() for page in folder.glob("*.md"))
    named = re.findall(r"^::: lora_jax\.(?:[\w.]+\.)?(\w+)$", text, re.MULTILINE)
    packages = re.findall(r"^<!-- api: lora_jax\.(?:\w+\.)*(\w+) -->$", text, re.MULTILINE)
    named = ["generate" if name == "generate_text" else name for name in named]
    # The classes of `lj.methods` are public names themselves.
    missing = {*lj.__all__} - {*named, *packages, "methods"}
    assert not missing and len(named) == len(set(named))
