"""Figures: arrays and tables in, plotly figures out, all in one look.

Conventions: layer 0 at the top and heads across; queries down and keys across; a diverging scale
centred on 0 for effects, a sequential one from 0 for everything else. Tokens sit at integer
positions with their text as tick labels, since plotly would merge equal labels into one column.
"""

from collections.abc import Iterable, Sequence
from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from jaxtyping import Float, Shaped
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from interp.errors import UserError
from interp.heads import Head, as_numpy, heads_of

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
MAX_TOKENS = 500  # more are megabytes of cells that no screen can show
EXACT_TOKENS = 128  # larger patterns travel as whole per cents, a byte a cell


class FigureError(UserError):
    """What was given cannot be drawn."""


def head_map(
    matrix: Shaped[Any, "layer head"],
    title: str = "",
    colorbar: str = "score",
    *,
    diverging: bool = False,
    counts: Shaped[Any, "layer head"] | None = None,
    mark: Iterable | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """Layer x head map; `mark` outlines heads, `counts` (n) go into the hover, NaN stays grey."""
    z = as_numpy(matrix).astype(np.float32)
    n_layers, n_heads = z.shape
    low, high = limits or _color_limits(z, diverging)
    hover = f"L%{{y}}H%{{x}}<br>{colorbar} %{{z:.4g}}"
    cells = go.Heatmap(
        z=z,
        x=np.arange(n_heads),
        y=np.arange(n_layers),
        customdata=None if counts is None else np.asarray(counts, dtype=np.int32),
        zmin=low,
        zmax=high,
        colorscale=DIVERGING if diverging else SEQUENTIAL,
        colorbar=_colorbar(colorbar),
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=hover + ("" if counts is None else "<br>n %{customdata}") + "<extra></extra>",
    )
    side = int(np.clip(560 / max(n_layers, n_heads, 1), 12, 34))
    figure = _figure(
        title,
        data=[cells],
        width=max(380, 180 + n_heads * side),
        height=max(300, 130 + n_layers * side),
        plot_bgcolor=NOTHING,
        shapes=[_outline(head, n_layers, n_heads) for head in heads_of(mark or [])],
    )
    figure.update_xaxes(title="head", **_indices(n_heads), showgrid=False, constrain="domain")
    figure.update_yaxes(title="layer", **_indices(n_layers), showgrid=False)
    figure.update_yaxes(range=[n_layers - 0.5, -0.5])
    return figure


def attention_pattern(
    patterns: Shaped[Any, "panel query key"],
    tokens: Sequence[str],
    titles: Sequence[str] | None = None,
    *,
    query_tokens: Sequence[str] | None = None,
    first_query: int | None = None,
    first_key: int = 0,
    title: str = "",
    columns: int = 4,
) -> go.Figure:
    """Patterns side by side, queries down and keys across, with one colour axis from 0.

    `tokens` name the keys. Queries are the same tokens or, where there are fewer, the last of
    them, unless `query_tokens` names others. `first_query` and `first_key` say where a block
    starts in the prompt.
    """
    share = as_numpy(patterns)
    n_panels, n_queries, n_keys = share.shape
    _check_pattern(share, tokens, titles)
    if query_tokens is None:
        query_tokens = tokens[n_keys - n_queries :]
        first_query = first_key + n_keys - n_queries if first_query is None else first_query
    first_query = first_query or 0
    side = int(np.clip(15 * max(n_keys, n_queries), 190, 420 if n_panels > 1 else 800))
    columns = max(1, min(columns, n_panels, 1200 // (side + 30)))
    rows = -(-n_panels // columns)
    keys = token_ticks(tokens, first_key, side // 13)
    queries = token_ticks(query_tokens, first_query, side // 13)
    gap = 50 + _label_pixels(keys)
    left, top = 20 + _label_pixels(queries), 70 if title else 40
    inner_width, inner_height = columns * (side + 24) - 24, rows * (side + gap) - gap
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=list(titles or [""] * n_panels),
        horizontal_spacing=24 / inner_width if columns > 1 else 0,
        vertical_spacing=gap / inner_height if rows > 1 else 0,
        shared_yaxes=True,
    )
    hover, places = "query %{y}<br>key %{x}<br>%{z:.1f} %", None
    if len(keys["tickvals"]) == n_keys:  # labels without positions; repeated tokens need them
        hover = "query %{customdata[0]}: %{y}<br>key %{customdata[1]}: %{x}<br>%{z:.1f} %"
        places = np.indices((n_queries, n_keys)).transpose(1, 2, 0)
        places = (places + np.array([first_query, first_key])).astype(np.uint32)
    for panel in range(n_panels):
        cells = go.Heatmap(
            z=_percent(share[panel]),
            x=np.arange(n_keys) + first_key,
            y=np.arange(n_queries) + first_query,
            coloraxis="coloraxis",
            customdata=places,
            hovertemplate=hover + f"<extra>{titles[panel] if titles else ''}</extra>",
        )
        figure.add_trace(cells, row=panel // columns + 1, col=panel % columns + 1)
    _dress(
        figure,
        title,
        width=left + inner_width + 110,
        height=top + inner_height + gap - 30,
        margin={"l": left, "r": 110, "t": top, "b": gap - 30},
    )
    figure.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": max(1.0, float(np.nanmax(share, initial=0)) * 100),
            "colorbar": _colorbar("attention, %"),
        }
    )
    figure.update_xaxes(**keys, matches="x", tickangle=-90, showgrid=False)
    figure.update_yaxes(**queries, matches="y", showgrid=False, automargin=False)
    figure.update_yaxes(range=[first_query + n_queries - 0.5, first_query - 0.5])
    return figure


def profile(
    positions: Sequence | np.ndarray | pd.Series,
    values: Sequence | np.ndarray | pd.Series,
    *,
    tokens: Sequence[str] | pd.Series | None = None,
    low: Sequence | np.ndarray | pd.Series | None = None,
    high: Sequence | np.ndarray | pd.Series | None = None,
    series: Sequence | np.ndarray | pd.Series | None = None,
    name: str = "",
    title: str = "",
    x_title: str = "position",
    y_title: str = "value",
    peaks: int = 5,
    log: bool = False,
) -> go.Figure:
    """A line over positions, with a band from `low` to `high` and the tokens of the peaks named.

    Everything is of one length, as from the columns of a long table; `series` says which line
    each value belongs to (lines are drawn in the order in which they first come).
    """
    table = _long_table(positions, values, low=low, high=high, token=tokens, series=series)
    if series is None:
        table["series"] = name
    figure = _figure(title, width=880)
    lines = list(table.groupby("series", sort=False))
    colors = _line_colors([label for label, _ in lines])
    for color, (label, line) in zip(colors, lines, strict=True):
        line = line.sort_values("position")
        if low is not None and high is not None:
            figure.add_trace(_band(line, color, str(label)))
        figure.add_trace(_line(line, color, str(label), tokens is not None, y_title))
    if tokens is not None:
        figure.add_trace(_peak_labels(table, peaks))
    figure.update_layout(showlegend=len(lines) > 1, height=max(400, 130 + 20 * len(lines)))
    figure.update_xaxes(title=x_title, showgrid=False)
    figure.update_yaxes(title=y_title, **_scale(log))
    if not log and (table["value"] >= 0).all():
        figure.update_yaxes(rangemode="tozero")
    return figure


def grid(
    table: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    n: str | None = None,
    *,
    title: str = "",
    colorbar: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> go.Figure:
    """A grid of cells with their number (and n) written in: accuracy by length x depth."""
    wanted = [column for column in (x, y, value, n) if column is not None]
    _need_columns(table, wanted)
    if table.duplicated([x, y]).any():
        raise FigureError(f"table: several rows share one {x} and {y}; average them first.")
    z = table.pivot(index=y, columns=x, values=value)
    texts = np.vectorize(lambda number: "" if np.isnan(number) else f"{number:.2f}")(z.to_numpy())
    if n is not None:
        counts = table.pivot(index=y, columns=x, values=n).fillna(0).to_numpy().astype(int)
        small = np.vectorize(lambda count: f'<br><span style="font-size:0.75em">n={count}</span>')
        texts = np.where(texts == "", "", np.char.add(texts, small(counts)))
    n_rows, n_columns = z.shape
    cells = go.Heatmap(
        z=z.to_numpy(np.float32),
        x=np.arange(n_columns),
        y=np.arange(n_rows),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        zmin=limits[0],
        zmax=limits[1],
        colorscale=SEQUENTIAL,
        colorbar=_colorbar(colorbar or value),
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate=f"{x} %{{x}}, {y} %{{y}}<br>{value} %{{z:.3f}}<extra></extra>",
    )
    figure = _figure(
        title,
        data=[cells],
        width=int(np.clip(220 + 80 * n_columns, 420, 980)),
        height=int(np.clip(140 + 52 * n_rows, 260, 900)),
        plot_bgcolor=NOTHING,
    )
    figure.update_xaxes(title=x, **_labels(z.columns), showgrid=False)
    figure.update_yaxes(title=y, **_labels(z.index), showgrid=False)
    figure.update_yaxes(range=[n_rows - 0.5, -0.5])
    return figure


def conditions(
    table: pd.DataFrame,
    *,
    draws: pd.DataFrame | None = None,
    title: str = "",
    confidence: str = "95 %",
) -> go.Figure:
    """A dot with its interval for each condition, one panel a metric: an edit and its controls.

    `table` has the columns `condition, metric, value, low, high, n`. `draws` (`condition, metric,
    value`) are shown as small grey dots, such as the single draws of random heads behind a mean.
    """
    _need_columns(table, ["condition", "metric", "value", "low", "high", "n"])
    if draws is not None:
        _need_columns(draws, ["condition", "metric", "value"])
    names = list(dict.fromkeys(table["condition"]))
    metrics = list(dict.fromkeys(table["metric"]))
    figure = make_subplots(
        1, len(metrics), subplot_titles=metrics, shared_yaxes=True, horizontal_spacing=0.05
    )
    for column, metric in enumerate(metrics, start=1):
        rows = table[table["metric"] == metric]
        if draws is not None:
            single = draws[(draws["metric"] == metric) & draws["condition"].isin(names)]
            figure.add_trace(_draw_dots(single, names), row=1, col=column)
        figure.add_trace(_interval_dots(rows, names, confidence), row=1, col=column)
        figure.update_xaxes(range=_metric_range(rows, draws, metric), row=1, col=column)
    _dress(figure, title, width=240 + 330 * len(metrics), height=130 + 58 * len(names))
    figure.update_layout(showlegend=False)
    figure.update_yaxes(**_labels(names), showgrid=False, range=[len(names) - 0.5, -0.6])
    figure.update_xaxes(nticks=6)
    return figure


def scatter(
    x: Shaped[Any, " point"],
    y: Shaped[Any, " point"],
    labels: Sequence | None = None,
    *,
    title: str = "",
    x_title: str = "x",
    y_title: str = "y",
    diagonal: bool = False,
) -> go.Figure:
    """Points named in the hover (heads in two runs, say); `diagonal` draws the line y = x."""
    x, y = as_numpy(x), as_numpy(y)
    if len(x) != len(y) or (labels is not None and len(labels) != len(x)):
        raise FigureError("x, y and labels: must be of one length.")
    figure = _figure(title, width=520, height=460)
    if diagonal and len(x):
        ends = [float(np.nanmin([x, y])), float(np.nanmax([x, y]))]
        line = {"color": FAINT, "dash": "dot"}
        figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"))
    points = go.Scatter(
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        mode="markers",
        marker={"size": 7, "opacity": 0.7, "color": PALETTE[0]},
        text=None if labels is None else [shown(str(label)) for label in labels],
        hovertemplate=("" if labels is None else "%{text}<br>")
        + f"{x_title} %{{x:.4g}}<br>{y_title} %{{y:.4g}}<extra></extra>",
    )
    figure.add_trace(points)
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return figure


def histogram(
    values: Shaped[Any, " value"],
    *,
    bins: int = 40,
    title: str = "",
    x_title: str = "score",
    y_title: str = "heads",
    threshold: float | None = None,
    log: bool = False,
) -> go.Figure:
    """How many values lie where, NaN left out; `threshold` draws a line. `log`: counts."""
    values = as_numpy(values)
    counts, edges = np.histogram(values[~np.isnan(values)], bins=bins)
    bars = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges),
        marker={"color": PALETTE[0], "line": {"color": "white", "width": 1}},
        customdata=np.stack([edges[:-1], edges[1:]], axis=1),
        hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y}<extra></extra>",
    )
    figure = _figure(title, data=[bars], width=620, height=360, bargap=0)
    figure.update_xaxes(title=x_title, showgrid=False)
    figure.update_yaxes(title=y_title, **_scale(log))
    if threshold is not None:
        figure.add_vline(
            threshold,
            line={"color": PALETTE[1], "dash": "dash"},
            annotation_text=f"{threshold:g}",
            annotation_font_color=PALETTE[1],
        )
    return figure


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


def _label_pixels(ticks: dict) -> int:
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


def _figure(title: str, data=(), **layout) -> go.Figure:
    return _dress(go.Figure(data=list(data)), title, **layout)


def _dress(figure: go.Figure, title: str, **layout) -> go.Figure:
    figure.update_layout(template=TEMPLATE, title={"text": title}, **layout)
    if not title:
        figure.update_layout(margin={"t": 30})
    return figure


def _colorbar(title: str) -> dict:
    size = {"thickness": 12, "lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top"}
    return {"title": {"text": title, "side": "top"}, "outlinewidth": 0, **size}


def _color_limits(z: Float[np.ndarray, "layer head"], diverging: bool) -> tuple[float, float]:
    there = z[np.isfinite(z)]
    if not there.size:
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    largest = float(np.abs(there).max()) or 1.0
    if diverging:
        return -largest, largest
    return min(0.0, float(there.min())), max(float(there.max()), 1e-12)


def _indices(count: int) -> dict:
    """Whole numbers as ticks, thinned so that they keep clear of each other."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if count <= 36 * s or s == 100)
    return {"tickmode": "array", "tickvals": list(range(0, count, step))}


def _labels(values: Iterable) -> dict:
    texts = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
    return {"tickmode": "array", "tickvals": list(range(len(texts))), "ticktext": texts}


def _scale(log: bool) -> dict:
    return {"type": "log", "dtick": 1, "exponentformat": "power"} if log else {"type": "linear"}


def _outline(head: Head, n_layers: int, n_heads: int) -> dict:
    if head.layer >= n_layers or head.head >= n_heads:
        raise FigureError(
            f"mark: {head} is not on the map of layers 0-{n_layers - 1}, heads 0-{n_heads - 1}."
        )
    return {
        "type": "rect",
        "x0": head.head - 0.5,
        "x1": head.head + 0.5,
        "y0": head.layer - 0.5,
        "y1": head.layer + 0.5,
        "line": {"color": PALETTE[1], "width": 2},
    }


def _check_pattern(
    share: Float[np.ndarray, "panel query key"], tokens: Sequence[str], titles: Sequence | None
):
    n_panels, n_queries, n_keys = share.shape
    if max(n_queries, n_keys) > MAX_TOKENS:
        raise FigureError(
            f"patterns: {n_queries} x {n_keys} cells; at most {MAX_TOKENS} tokens can be drawn. "
            "Take a block of queries and keys."
        )
    if len(tokens) != n_keys:
        raise FigureError(f"tokens: {len(tokens)} for {n_keys} keys; give one for each.")
    if n_panels == 0 or (titles is not None and len(titles) != n_panels):
        raise FigureError(f"titles: {len(titles or [])} for {n_panels} patterns; one for each.")


def _percent(share: Float[np.ndarray, "query key"]) -> Shaped[np.ndarray, "query key"]:
    percent = 100 * share
    return (
        percent.astype(np.float32)
        if max(share.shape) <= EXACT_TOKENS
        else percent.round().astype(np.uint8)
    )


def _long_table(positions, values, **optional) -> pd.DataFrame:
    columns = {"position": positions, "value": values, **optional}
    columns = {name: list(column) for name, column in columns.items() if column is not None}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise FigureError(f"profile: everything must be of one length, not {told}.")
    return pd.DataFrame(columns)


def _line_colors(labels: list) -> list[str]:
    if len(labels) <= len(PALETTE):
        return PALETTE[: len(labels)]
    return list(map(str, sample_colorscale("viridis", np.linspace(0, 0.92, len(labels)).tolist())))


def _line(
    line: pd.DataFrame, color: str, label: str, with_tokens: bool, y_title: str
) -> go.Scatter:
    token = "%{text}<br>" if with_tokens else ""
    return go.Scatter(
        x=line["position"].to_numpy(),
        y=line["value"].to_numpy(np.float32),
        name=label,
        legendgroup=label,
        mode="lines+markers" if len(line) <= 80 else "lines",
        line={"color": color, "width": 2},
        marker={"size": 5},
        text=[shown(str(token)) for token in line["token"]] if with_tokens else None,
        hovertemplate=f"position %{{x}}<br>{token}{y_title} %{{y:.4g}}<extra>{label}</extra>",
    )


def _band(line: pd.DataFrame, color: str, label: str) -> go.Scatter:
    there = line.dropna(subset=["low", "high"])
    return go.Scatter(
        x=np.concatenate([there["position"], there["position"][::-1]]),
        y=np.concatenate([there["high"], there["low"][::-1]]).astype(np.float32),
        fill="toself",
        fillcolor=color,
        opacity=0.18,
        line={"width": 0},
        legendgroup=label,
        showlegend=False,
        hoverinfo="skip",
    )


def _peak_labels(table: pd.DataFrame, peaks: int) -> go.Scatter:
    best = table.loc[table.groupby("position")["value"].idxmax().dropna().astype(int)]
    chosen = best.iloc[_peaks(best["position"].to_numpy(), best["value"].to_numpy(), peaks)]
    return go.Scatter(
        x=chosen["position"].to_numpy(),
        y=chosen["value"].to_numpy(np.float32),
        mode="text",
        text=[shown(str(token)) for token in chosen["token"]],
        textposition="top center",
        textfont={"size": 12, "color": INK},
        cliponaxis=False,
        showlegend=False,
        hoverinfo="skip",
    )


def _peaks(
    positions: Shaped[np.ndarray, " point"], values: Float[np.ndarray, " point"], peaks: int
) -> list[int]:
    """Indices of the highest local maxima that stand far enough apart for their names to fit."""
    padded = np.pad(values.astype(float), 1, constant_values=-np.inf)
    is_peak = (values >= padded[:-2]) & (values >= padded[2:])
    apart = 0.06 * (positions.max() - positions.min()) if len(positions) else 0
    chosen: list[int] = []
    for i in np.argsort(-values, kind="stable"):
        clear = all(abs(positions[i] - positions[j]) > apart for j in chosen)
        if is_peak[i] and clear and len(chosen) < peaks:
            chosen.append(int(i))
    return chosen


def _need_columns(table: pd.DataFrame, names: Sequence[str]):
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise FigureError(
            f"table: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table))}."
        )


def _interval_dots(rows: pd.DataFrame, names: list, confidence: str) -> go.Scatter:
    value, low, high = (rows[name].to_numpy(np.float64) for name in ("value", "low", "high"))
    return go.Scatter(
        x=value,
        y=[names.index(condition) for condition in rows["condition"]],
        mode="markers+text",
        text=[f"{number:.3g}" for number in value],
        textposition="top center",
        textfont={"size": 12},
        cliponaxis=False,
        marker={"size": 10, "color": PALETTE[0]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": high - value,
            "arrayminus": value - low,
            "color": PALETTE[0],
            "thickness": 2,
            "width": 5,
        },
        customdata=np.stack([low, high, rows["n"].to_numpy(np.float64)], axis=1),
        hovertemplate=(
            f"%{{x:.4g}}<br>{confidence}: %{{customdata[0]:.4g}} to %{{customdata[1]:.4g}}"
            "<br>n %{customdata[2]:.0f}<extra></extra>"
        ),
    )


def _draw_dots(draws: pd.DataFrame, names: list) -> go.Scatter:
    # below the mean's line, so that neither hides the other
    return go.Scatter(
        x=draws["value"].to_numpy(np.float64),
        y=[names.index(condition) + 0.24 for condition in draws["condition"]],
        mode="markers",
        marker={"size": 6, "color": "#8A8A8A", "opacity": 0.6},
        hovertemplate="one draw: %{x:.4g}<extra></extra>",
    )


def _metric_range(rows: pd.DataFrame, draws: pd.DataFrame | None, metric) -> list[float]:
    numbers = rows[["value", "low", "high"]].to_numpy(np.float64).ravel()
    if draws is not None:
        single = draws.loc[draws["metric"] == metric, "value"].to_numpy(np.float64)
        numbers = np.concatenate([numbers, single])
    numbers = numbers[np.isfinite(numbers)]
    low, high = (numbers.min(), numbers.max()) if numbers.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0  # shares are read against their whole range
    margin = 0.07 * (high - low or 1.0)
    return [float(low - margin), float(high + margin)]
