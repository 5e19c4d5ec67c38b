"""Pieces of HTML that several parts of the report are made of."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table; cells are HTML that was escaped already. Columns `numeric` are aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="n"' if index in numeric else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line([escape(cell) for cell in head], "th")}{body}</table></div>'


def jpeg(content: bytes, alt: str) -> str:
    """A JPEG file as an image inside the page."""
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/jpeg;base64,{base64.b64encode(content).decode()}">'


def shortened(text: str, most: int) -> str:
    """`text` on one line, with at most `most` characters; its end is cut."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
