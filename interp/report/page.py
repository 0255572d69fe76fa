"""The page itself: sections of sentences, figures and tables, as one HTML file that needs no other.

plotly.js is in it once; the numbers behind every figure and table lie beside it as parquet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from interp.files import write_atomically

TEMPLATE = files("interp.report").joinpath("page.html.j2")


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure, the table behind it, and how to read it. `name` is its file's name."""

    name: str
    title: str
    plot: go.Figure
    table: pd.DataFrame
    how: str

    def html(self) -> Markup:
        """A div and its script; plotly.js is the page's matter."""
        picture = {"format": "svg", "filename": self.name}
        config = {"displaylogo": False, "displayModeBar": "hover", "responsive": False}
        config["toImageButtonOptions"] = picture
        html = self.plot.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"plot-{self.name}", config=config
        )
        return Markup(html)  # plotly escapes what goes into its script


@dataclass(frozen=True, eq=False)
class Table:
    """A table; `shown` is what the page prints of it, numbers already formatted."""

    name: str
    title: str
    table: pd.DataFrame
    shown: pd.DataFrame
    how: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """One part of the page; `headline` is what the summary at the top says of it."""

    name: str
    title: str
    headline: str
    parts: Sequence[str | Figure | Table] = field(default_factory=list)

    @property
    def exhibits(self) -> list[Figure | Table]:
        """Its figures and tables."""
        return [part for part in self.parts if not isinstance(part, str)]


def write_page(path: Path, title: str, sections: Sequence[Section], about: dict[str, Any]) -> Path:
    """Write the page to `path`, and the parquet of each figure and table to `figures/` beside it.

    `about`: `rows` of the provenance, `subtitle`, `versions`, and `json`, the whole record.
    """
    folder = path.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for exhibit in (exhibit for section in sections for exhibit in section.exhibits):
        write_atomically(folder / f"{exhibit.name}.parquet", exhibit.table.to_parquet)
    html = render(title, sections, about)
    write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return path


def render(title: str, sections: Sequence[Section], about: dict[str, Any]) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tied"] = lambda text: text.replace(" %", "\u00a0%")  # kept on one line
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        sections=sections,
        about=about,
        labels=labels_of([exhibit for section in sections for exhibit in section.exhibits]),
        plotlyjs=Markup(get_plotlyjs()),
        is_text=lambda part: isinstance(part, str),
        is_figure=lambda part: isinstance(part, Figure),
    )


def labels_of(exhibits: Sequence[Figure | Table]) -> dict[str, str]:
    """`Figure 1`, `Table 1`, ... by name."""
    labels = {}
    for kind in (Figure, Table):
        names = [exhibit.name for exhibit in exhibits if isinstance(exhibit, kind)]
        labels |= {name: f"{kind.__name__} {n}" for n, name in enumerate(names, start=1)}
    return labels
