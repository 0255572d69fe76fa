"""The look that all figures share: colours, template, labels and ticks."""

from collections.abc import Iterable, Sequence
from html import unescape

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from interp.errors import UserError

# Okabe and Ito's palette: told apart with every common colour blindness.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E"]


SEQUENTIAL = [
    [0, "#f7fbff"],
    [0.25, "#c6dbef"],
    [0.5, "#6baed6"],
    [0.75, "#2171b5"],
    [1, "#08306b"],
]
DIVERGING = "RdBu_r"
INK, FAINT, NOTHING = "#222222", "#B8B8B8", "#D9D9D9"


MAX_LABELS = 60  # of more tokens every second, fifth, ... gets a label


class FigureError(UserError):
    """What was given cannot be drawn."""


def shown(token: str, longest: int = 14) -> str:
    """A token as a label: visible white space, no markup, not longer than `longest`."""
    text = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    text = text.replace("\n", "⏎").replace("\r", "").replace("\t", "⇥")
    text = text.strip(" ") or "␣" * min(len(text), 3) or "∅"
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    # plotly reads <s> as strike-through, and $..$ as TeX
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(sign, entity)
    return text


def token_ticks(tokens: Sequence[str], first: int = 0, room: int = MAX_LABELS) -> dict:
    """Axis settings that name tokens at integer positions, at most `room` of them."""
    room = min(room, MAX_LABELS)
    step = next((s for s in (1, 2, 5, 10, 20, 50) if len(tokens) <= s * room), 100)
    places = range(0, len(tokens), step)
    # with gaps between the labels a bare word would not say where it stands
    texts = [shown(tokens[i]) if step == 1 else f"{first + i}: {shown(tokens[i])}" for i in places]
    return {
        "tickmode": "array",
        "tickvals": [first + i for i in places],
        "ticktext": texts,
        "tickfont": {"size": 11 if len(places) <= 40 else 9},
    }


def label_pixels(ticks: dict) -> int:
    """Roughly how long the longest tick label is."""
    longest = max((len(unescape(text)) for text in ticks["ticktext"]), default=0)
    return round(0.65 * ticks["tickfont"]["size"] * longest)


def _template() -> go.layout.Template:
    axis = {
        "showline": True,
        "linecolor": "#888888",
        "gridcolor": "#E8E8E8",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#888888",
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 14}},
    }
    template = go.layout.Template(pio.templates["plotly_white"])
    template.layout.update(
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        title={
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "pad": {"l": 16, "t": 4},
            "font": {"size": 17},
        },
        colorway=PALETTE,
        hoverlabel={"font": {"size": 13}, "align": "left"},
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        legend={"tracegroupgap": 0},
        xaxis=axis,
        yaxis=axis,
    )
    return template


TEMPLATE = _template()


def new_figure(title: str, data=(), **layout) -> go.Figure:
    return dress(go.Figure(data=list(data)), title, **layout)


def dress(figure: go.Figure, title: str, **layout) -> go.Figure:
    figure.update_layout(template=TEMPLATE, title={"text": title}, **layout)
    if not title:
        figure.update_layout(margin={"t": 30})
    return figure


def colorbar_of(title: str) -> dict:
    size = {"thickness": 12, "lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top"}
    return {"title": {"text": title, "side": "top"}, "outlinewidth": 0, **size}


def indices(count: int) -> dict:
    """Whole numbers as ticks, thinned so that they keep clear of each other."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if count <= 36 * s or s == 100)
    return {"tickmode": "array", "tickvals": list(range(0, count, step))}


def labels_at(values: Iterable) -> dict:
    texts = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
    return {"tickmode": "array", "tickvals": list(range(len(texts))), "ticktext": texts}


def scale(log: bool) -> dict:
    return {"type": "log", "dtick": 1, "exponentformat": "power"} if log else {"type": "linear"}


def need_columns(table: pd.DataFrame, names: Sequence[str]):
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise FigureError(
            f"table: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table))}."
        )
