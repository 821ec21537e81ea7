"""The schema in words: the list of `--help`, and the table of README.md."""

from __future__ import annotations

from lora_jax.settings.fields import Setting
from lora_jax.settings.schema import METHODS, SECTIONS, SETTINGS


def described() -> str:
    """A line each: the setting with its default, and what it is."""
    names = {}
    for key, facts in _in_order():
        names[key] = key
        if not facts.required and facts.default not in (None, ""):
            names[key] += f"={str(facts.default).lower()}".replace(" ", "")
    width = max(map(len, names.values()))
    return "\n".join(f"  {names[key]:{width}}  {_about(facts)}" for key, facts in _in_order())


def table() -> str:
    """All settings as a Markdown table."""
    lines = [
        "| setting | type | default | range | role | |",
        "|---|---|---|---|---|---|",
    ]
    for key, facts in _in_order():
        cells = (f"`{key}`", facts.kind, _default(key), facts.range, facts.role, _about(facts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_order() -> list[tuple[str, Setting]]:
    sections = ("seed", *SECTIONS)
    return sorted(SETTINGS.items(), key=lambda row: sections.index(row[0].partition(".")[0]))


def _default(key: str) -> str:
    facts = SETTINGS[key]
    if facts.required:
        return "required"
    if facts.default is not None:
        return f"`{facts.default!r}`"
    methods: dict[str, list[str]] = {}  # by their own defaults
    for method, joined in METHODS.items():
        if (own := joined.settings.get(key.partition(".")[2])) is not None:
            methods.setdefault(repr(own.default), []).append(method)
    return ", ".join(f"`{value}` ({', '.join(names)})" for value, names in methods.items())


def _about(facts: Setting) -> str:
    return f"{facts.help} ({facts.unit})" if facts.unit else facts.help
