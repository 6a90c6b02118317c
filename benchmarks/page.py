"""Tables and pictures of a benchmark: on the terminal, and as one HTML page.

Knows nothing of what the figures mean.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

TEMPLATE = Path(__file__).with_suffix(".html.jinja")


@dataclass(frozen=True)
class Sheet:
    """A table whose cells are text; the first column is the name of the row."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self, console: Console) -> None:
        """Print it."""
        table = Table(title=self.title)
        for place, head in enumerate(self.heads):
            table.add_column(head, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Any) -> str:
    """A figure as inline SVG; the same figures give the same text."""
    from matplotlib import rc_context

    sink = io.StringIO()
    with rc_context({"svg.hashsalt": "leadre", "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]


def write_page(
    path: Path, title: str, words: str, plot: str, sheets: Sequence[Sheet], about: str | None
) -> None:
    """Write the page: what it shows in a sentence, a picture, tables, and what the figures are."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(title=title, words=words, plot=plot, tables=sheets, about=about)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
