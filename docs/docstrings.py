"""Docstrings as the site needs them.

Examples (`>>> …`) become code blocks, since Markdown would read them as quotations; a returned
tuple loses its backticks, since Griffe reads it as a type.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = RETURNED.sub(r"\1\2:", fenced(obj.docstring.value))


RETURNED = re.compile(r"(^Returns:\n\s+)`([^`\n]+)`:", re.MULTILINE)


def fenced(text: str) -> str:
    """The text with a fence around each run of lines from `>>>` to a blank line.

    >>> print(fenced("Adds.\\n\\n>>> 1 + 1\\n2\\n\\nMore."))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    More.
    """
    lines, inside = [], False
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith(">>> ") and not inside:
            lines.append("```pycon")
            inside = True
        if inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join(lines[:-1])
