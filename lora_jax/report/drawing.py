"""A figure of a page, however it was drawn."""

from dataclasses import dataclass

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Drawing:
    """One figure: a name for its anchor, a title and a caption in plain text, and the SVG."""

    name: str
    title: str
    caption: str
    svg: str
