"""Figures with a colour for each cell: maps of heads and effects, attention patterns, grids."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Shaped
from plotly.subplots import make_subplots

from interp.figures.lines import conditions
from interp.figures.look import (
    DIVERGING,
    NOTHING,
    PALETTE,
    SEQUENTIAL,
    FigureError,
    colorbar_of,
    dress,
    indices,
    label_pixels,
    labels_at,
    need_columns,
    new_figure,
    token_ticks,
)
from interp.heads import Head, as_numpy, heads_of

MAX_TOKENS = 500  # more are megabytes of cells that no screen can show


EXACT_TOKENS = 128  # larger patterns travel as whole per cents, a byte a cell


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
        colorbar=colorbar_of(colorbar),
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=hover + ("" if counts is None else "<br>n %{customdata}") + "<extra></extra>",
    )
    side = int(np.clip(560 / max(n_layers, n_heads, 1), 12, 34))
    figure = new_figure(
        title,
        data=[cells],
        width=max(380, 180 + n_heads * side),
        height=max(300, 130 + n_layers * side),
        plot_bgcolor=NOTHING,
        shapes=[_outline(head, n_layers, n_heads) for head in heads_of(mark or [])],
    )
    figure.update_xaxes(title="head", **indices(n_heads), showgrid=False, constrain="domain")
    figure.update_yaxes(title="layer", **indices(n_layers), showgrid=False)
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
    gap = 50 + label_pixels(keys)
    left, top = 20 + label_pixels(queries), 70 if title else 40
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
    dress(
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
            "colorbar": colorbar_of("attention, %"),
        }
    )
    figure.update_xaxes(**keys, matches="x", tickangle=-90, showgrid=False)
    figure.update_yaxes(**queries, matches="y", showgrid=False, automargin=False)
    figure.update_yaxes(range=[first_query + n_queries - 0.5, first_query - 0.5])
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
    need_columns(table, wanted)
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
        colorbar=colorbar_of(colorbar or value),
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate=f"{x} %{{x}}, {y} %{{y}}<br>{value} %{{z:.3f}}<extra></extra>",
    )
    figure = new_figure(
        title,
        data=[cells],
        width=int(np.clip(220 + 80 * n_columns, 420, 980)),
        height=int(np.clip(140 + 52 * n_rows, 260, 900)),
        plot_bgcolor=NOTHING,
    )
    figure.update_xaxes(title=x, **labels_at(z.columns), showgrid=False)
    figure.update_yaxes(title=y, **labels_at(z.index), showgrid=False)
    figure.update_yaxes(range=[n_rows - 0.5, -0.5])
    return figure


def head_maps(
    matrices: Sequence[Shaped[Any, "layer head"]],
    titles: Sequence[str],
    marks: Sequence[Iterable] | None = None,
    *,
    both: Iterable = (),
    title: str = "",
    colorbar: str = "score",
) -> go.Figure:
    """Layer x head maps side by side on one diverging scale; `marks` outlines heads of each.

    Heads in `both` are outlined in another colour.
    """
    values = [as_numpy(matrix).astype(np.float32) for matrix in matrices]
    if len({z.shape for z in values}) != 1 or len(titles) != len(values):
        shapes = ", ".join(str(z.shape) for z in values)
        raise FigureError(f"matrices: maps of one shape and a title for each; here are {shapes}.")
    n_layers, n_heads = values[0].shape
    side = int(np.clip(560 / max(n_layers, n_heads), 12, 30))
    figure = make_subplots(
        1, len(values), subplot_titles=list(titles), shared_yaxes=True, horizontal_spacing=0.06
    )
    _, high = _color_limits(np.concatenate(values), True)
    for column, z in enumerate(values, start=1):
        cells = go.Heatmap(
            z=z, x=np.arange(n_heads), y=np.arange(n_layers), coloraxis="coloraxis", xgap=1, ygap=1,
            hovertemplate=f"L%{{y}}H%{{x}}<br>{colorbar} %{{z:.4g}}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(cells, row=1, col=column)
        shared = set(heads_of(both))
        for head in heads_of(marks[column - 1] if marks else []):
            outline = _outline(head, n_layers, n_heads)
            if head in shared:
                outline["line"] = {"color": PALETTE[2], "width": 3}
            figure.add_shape(outline, row=1, col=column)
    dress(
        figure,
        title,
        width=150 + len(values) * (60 + n_heads * side),
        height=max(300, 130 + n_layers * side),
        plot_bgcolor=NOTHING,
    )
    scale = {
        "colorscale": DIVERGING,
        "cmin": -high,
        "cmax": high,
        "colorbar": colorbar_of(colorbar),
    }
    figure.update_layout(coloraxis=scale)
    figure.update_xaxes(title="head", **indices(n_heads), showgrid=False)
    figure.update_yaxes(**indices(n_layers), showgrid=False, range=[n_layers - 0.5, -0.5])
    figure.update_yaxes(title="layer", col=1)
    return figure


def effects(
    table: pd.DataFrame,
    by: Sequence[str],
    value: str = "effect",
    *,
    tokens: Sequence[str] | None = None,
    title: str = "",
    mark: Iterable | None = None,
) -> go.Figure:
    """What patches do, by the axes of their grid: a map over two of them, dots over one.

    `tokens` names the positions where these are numbers. Raises `FigureError` for three axes.
    """
    need_columns(table, [*by, value])
    if len(by) > 2:
        raise FigureError(
            f"by={list(by)}: a map has two axes; choose rows of the table first, such as one "
            "position."
        )
    if set(by) == {"layer", "head"}:
        return head_map(
            _pivot(table, "layer", "head", value), title, value, diverging=True, mark=mark
        )
    if len(by) == 1:
        names = [str(v) if by[0] == "position" else f"{by[0]} {v}" for v in table[by[0]]]
        rows = table.assign(condition=names, metric=value, value=table[value])
        return conditions(rows, title=title)
    down = "layer" if "layer" in by else "head"
    across = next(axis for axis in by if axis != down)
    return position_map(table, down, across, value, tokens=tokens, title=title)


def position_map(
    table: pd.DataFrame,
    down: str,
    across: str,
    value: str,
    *,
    tokens: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """A map of `value` with positions (numbers, or names in their order) across."""
    columns = list(dict.fromkeys(table[across]))
    rows = sorted(table[down].unique())
    z = table.pivot(index=down, columns=across, values=value).loc[rows, columns]
    low, high = _color_limits(z.to_numpy(np.float64), True)
    if tokens is not None and len(tokens) == len(columns):
        labels = token_ticks(tokens)
    else:
        labels = labels_at(columns)
    cells = go.Heatmap(
        z=z.to_numpy(np.float32), x=np.arange(len(columns)), y=np.arange(len(rows)), zmin=low,
        zmax=high, colorscale=DIVERGING, colorbar=colorbar_of(value), xgap=1, ygap=1,
        hovertemplate=f"{down} %{{y}}, {across} %{{x}}<br>{value} %{{z:.3g}}<extra></extra>",
    )  # fmt: skip
    figure = new_figure(
        title,
        data=[cells],
        width=int(np.clip(220 + 30 * len(columns), 420, 1100)),
        height=int(np.clip(160 + 18 * len(rows), 300, 900)),
    )
    figure.update_xaxes(title=across, **labels, showgrid=False, tickangle=-60)
    figure.update_yaxes(title=down, **indices(len(rows)), showgrid=False)
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5])
    return figure


def _pivot(
    table: pd.DataFrame, down: str, across: str, value: str
) -> Float[np.ndarray, "down across"]:
    found = np.full((table[down].max() + 1, table[across].max() + 1), np.nan)
    found[table[down], table[across]] = table[value]
    return found


def _color_limits(z: Float[np.ndarray, "layer head"], diverging: bool) -> tuple[float, float]:
    there = z[np.isfinite(z)]
    if not there.size:
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    largest = float(np.abs(there).max()) or 1.0
    if diverging:
        return -largest, largest
    return min(0.0, float(there.min())), max(float(there.max()), 1e-12)


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
