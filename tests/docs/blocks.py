"""The code blocks of the site's pages, run from top to bottom, and what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs"
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?"
    r"^```(?:\{ *\.)?(?P<kind>\w+)(?P<more>[^\n]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and why it is not run, if it is not."""

    kind: str
    code: str
    why: str = ""
    is_output: bool = False


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(one["kind"], one["code"], one["why"] or "", ".output" in one["more"]) for one in found
    ]


def is_slow(page: Path) -> bool:
    """Whether the page says at its top that it takes minutes."""
    return page.read_text(encoding="utf-8").startswith("---\ntest: slow\n---\n")


def run_page(page: Path) -> list[tuple[str, str]]:
    """Runs a page in the current folder; `(printed, expected)` of each block with an output."""
    names: dict = {"__name__": "page"}
    printed, pairs = "", []
    for number, block in enumerate(blocks_of(page)):
        if block.is_output:
            pairs.append((printed, block.code))
        elif not block.why and block.kind in RUN:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                RUN[block.kind](block.code, names, f"{page.name}, block {number}")
            printed = said.getvalue()
    return pairs


def run_python(code: str, names: dict, place: str) -> None:
    """In the page's one namespace."""
    exec(compile(code, place, "exec"), names)


def run_shell(code: str, names: dict, place: str) -> None:
    """Each command: those of lora-jax in this process, which has JAX already; others in a shell."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "lora-jax":
            assert main(words[1:]) == 0, f"{place}: {line}"
        elif words:
            print(_in_a_shell(line), end="")


def _in_a_shell(line: str) -> str:
    command = f'lora-jax() {{ "{sys.executable}" -m lora_jax "$@"; }}\n{line}'
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        ["bash", "-ec", command], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout  # fmt: skip


RUN = {"python": run_python, "sh": run_shell}


def agree(printed: str, expected: str) -> bool:
    """Whether a page shows what was printed: "…" stands for anything, and a number with decimals
    may differ by two of its last digit.

    >>> agree("loss 0.1234 at 40", "loss 0.12 at 40"), agree("loss 0.15 at 40", "loss 0.12 at 40")
    (True, False)
    >>> agree("a, b, c and d", "a … d"), agree("40 steps", "41 steps")
    (True, False)
    """
    parts = [_pattern(part) for part in expected.strip().split("…")]
    found = re.fullmatch(".*?".join(parts), " ".join(printed.split()), re.DOTALL)
    shown = [text for part in expected.split("…") for text in NUMBER.findall(part)]
    return found is not None and all(map(_near, found.groups(), shown))


def _pattern(text: str) -> str:
    """The text with a group for each number, and any blanks for blanks."""
    pieces = [re.escape(piece) for piece in NUMBER.split(text)]
    joined = f"({NUMBER.pattern})".join(pieces)
    return re.sub(r"(\\\s|\s)+", r"\\s*", joined)


def _near(printed: str, shown: str) -> bool:
    first, second = (float(text.replace(",", "").replace("−", "-")) for text in (printed, shown))
    mantissa, _, exponent = shown.partition("e")
    decimals = len(mantissa.partition(".")[2])
    if not decimals:
        return first == second or bool(exponent)
    return abs(first - second) <= 2.001 * 10.0 ** (int(exponent or 0) - decimals)
