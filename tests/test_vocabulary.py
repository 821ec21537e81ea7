"""Pages, docstrings, comments and messages use the field's words, not this project's old ones."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `{what is not written: what to write}`, as far as a search can tell the word from others.
SAY = {
    r"\bbook(s|keeping)\b": "training progress",
    r"\bkeepers?\b": "callback",
    r"\btold\b": "notified; printed; told apart: distinguished",
    r"\blaps?\b": "timed section",
    r"\bcontestants?\b": "method or arm",
    r"\bbeside\b": "next to, with, alongside, in addition to",
    r"\bbut for\b": "except",
    r"\b(is|are) no number\b": "is not finite",
    r"\brounding may make\b": "numerical noise",
    r"\b(an?|each|every|one|two|three|four|last|first) looks?\b(?! up)": "evaluation",
    r"\binterval (that )?holds\b|\bholds the margin\b": "the interval contains the margin",
    r"\bslots?\b": "lane",
}
NAMES = re.compile(r"`[^`\n]*`|--[\w-]+|<[a-z][^<>]*>|^ *\w+: ", re.M)
# "Bookkeeping" is a role of settings.
ROLE = {
    "docs/reference/settings.md",
    "lora_jax/settings/README.md",
    "lora_jax/settings/fields.py",
}


def files() -> list[Path]:
    found = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md")]
    for folder, endings in {
        "lora_jax": ("py", "md", "html", "js"),
        "experiments/configs": ("py",),
        "experiments/results": ("md",),
        "docs": ("md",),
    }.items():
        for ending in endings:
            found += (ROOT / folder).rglob(f"*.{ending}")
    return sorted({*found, ROOT / "experiments" / "README.md"})


def prose_of(path: Path) -> Iterator[str]:
    """The texts of a file that a person reads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield text
        return
    for node in ast.walk(ast.parse(text)):
        # A string without a blank is a key or a name.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def words_of(text: str) -> str:
    """The text in one line, without code spans, options, tags and names of arguments."""
    return " ".join(NAMES.sub("", text).split())


def hits_in(text: str) -> list[str]:
    words, found = words_of(text), []
    for pattern, term in SAY.items():
        for hit in re.finditer(pattern, words, re.I):
            around = words[max(0, hit.start() - 40) : hit.end() + 40]
            found.append(f"…{around}…: {hit[0]!r} is {term}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_the_fields_words(path):
    place = str(path.relative_to(ROOT))
    hits = [hit for text in prose_of(path) for hit in hits_in(text)]
    if place in ROLE:
        hits = [hit for hit in hits if "bookkeeping" not in hit.lower()]
    assert not hits, "\n".join([place, *hits])


@pytest.mark.parametrize(
    "text",
    [
        "the loss\nbeside it", "a bookkeeping record", "Who is told?", "a lap", "every look",
        "a loss that is no number", "what rounding may make", "all but for one",
    ],
)  # fmt: skip
def test_an_old_word_is_found(text):
    assert hits_in(text)


@pytest.mark.parametrize("text", ["`beside` and --beside=DIR", "look it up", "facebook", "slotted"])
def test_names_and_other_words_pass(text):
    assert not hits_in(text)
