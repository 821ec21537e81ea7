"""The schema in words: the list of `--help`, and the table of README.md."""

from __future__ import annotations

from lora_jax.settings.fields import Setting
from lora_jax.settings.schema import METHODS, SECTIONS, SETTINGS


def described() -> str:
    """A line each: the setting with its default, and what it is."""
    said = {key: f"{key}{_equals(SETTINGS[key])}" for key in _in_order()}
    width = max(map(len, said.values()))
    return "\n".join(f"  {said[key]:{width}}  {_about(SETTINGS[key])}" for key in said)


def table() -> str:
    """All settings as a Markdown table."""
    lines = [
        "| setting | type | default | range | role | |",
        "|---|---|---|---|---|---|",
    ]
    for key in _in_order():
        facts = SETTINGS[key]
        cells = (f"`{key}`", facts.kind, _default(key), facts.range, facts.role, _about(facts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_order() -> list[str]:
    sections = ("seed", *SECTIONS)
    return sorted(SETTINGS, key=lambda key: sections.index(key.partition(".")[0]))


def _equals(facts: Setting) -> str:
    if facts.required or facts.default in (None, ""):
        return ""
    return f"={str(facts.default).lower()}".replace(" ", "")


def _default(key: str) -> str:
    facts = SETTINGS[key]
    if facts.required:
        return "required"
    if facts.default is not None:
        return f"`{facts.default!r}`"
    name = key.partition(".")[2]
    of = {m: joined.settings[name].default for m, joined in METHODS.items()
          if name in joined.settings}  # fmt: skip
    values = {repr(value): [m for m in of if of[m] == value] for value in of.values()}
    return ", ".join(f"`{value}` ({', '.join(names)})" for value, names in values.items())


def _about(facts: Setting) -> str:
    return f"{facts.help} ({facts.unit})" if facts.unit else facts.help
