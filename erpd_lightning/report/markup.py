"""HTML elements of the report's page: figures, tables, notes, and text that is safe to show."""

import base64
import html
from collections.abc import Iterable, Sequence

from ..text import visible
from .plots import DARK, LIGHT, Draw

LONG_NAME_LENGTH = 24
"""Characters from which on a name in a table is broken into lines."""


def figure(draw: Draw, alt: str, caption: str) -> str:
    """Figure with a plot for light and one for dark pages.

    Args:
        draw: Draws the plot in the colours of a theme.
        alt: Text for readers who do not see the plot.
        caption: Text below it.
    """
    light, dark = (base64.b64encode(draw(theme)).decode() for theme in (LIGHT, DARK))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{escaped(visible(alt))}" src="data:image/png;base64,{light}"></picture>'
        f"<figcaption>{escaped(visible(caption))}</figcaption></figure>"
    )


def table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", words: int = 1) -> str:
    """Table in a container that scrolls by itself.

    Args:
        label: Name of the table for screen readers.
        columns: Heads of the columns.
        rows: Cells of each row.
        caption: Text below; empty for none.
        words: Number of first columns that hold words; the others hold numbers.
    """
    heads = (f"<th{_cell_class(i < words)} scope=col>{escaped(column)}</th>" for i, column in enumerate(columns))
    lines = (
        "".join(f"<td{_cell_class(i < words, len(cell))}>{escaped(visible(cell))}</td>" for i, cell in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    below = f'<p class="caption">{escaped(caption)}</p>' if caption else ""
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escaped(label)}">'
        f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>{below}"
    )


def note(text: str) -> str:
    """Highlighted paragraph."""
    return f'<p class="note">{escaped(text)}</p>'


def escaped(text: str) -> str:
    """Text as HTML, also within an attribute."""
    return html.escape(text, quote=True)


def multiline(text: str) -> str:
    """Text of a policy or a data set as HTML: all of its characters and line breaks show."""
    return escaped(visible(text, lines=True)).replace("\n", "⏎\n")


def _cell_class(is_word: bool, length: int = 0) -> str:
    """Attribute of a cell: numbers stay on their line, long names do not."""
    if not is_word:
        return ""
    return ' class="word long"' if length > LONG_NAME_LENGTH else ' class="word"'
