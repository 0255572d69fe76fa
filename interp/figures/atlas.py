"""The atlas of an image encoder: where every head looks, in one mosaic."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Shaped

from interp.figures.look import (
    INK,
    PALETTE,
    SEQUENTIAL,
    FigureError,
    colorbar_of,
    new_figure,
)
from interp.heads import as_numpy, heads_of


def offset_atlas(
    offsets: Shaped[Any, "layer head rows columns"],
    *,
    layers: Sequence[int] | None = None,
    title: str = "",
    mark: Iterable | None = None,
    most: float | None = None,
) -> go.Figure:
    """A small map for every head, layers down and heads across: the share of each offset.

    The middle of a map is the patch that looks; up is up in the image. Colours go with the square
    root of the share, up to `most` (default: the largest). `mark` outlines heads.
    """
    share = as_numpy(offsets).astype(np.float32)
    n_layers, n_heads, n_rows, n_columns = share.shape
    if n_rows != n_columns or not n_rows % 2:
        raise FigureError(
            f"offsets: {n_rows} x {n_columns} for a head; an odd square, 2g - 1 for g x g patches."
        )
    names = list(range(n_layers)) if layers is None else list(layers)
    step = n_rows + 1  # a gap between maps
    mosaic = np.full((n_layers * step - 1, n_heads * step - 1), np.nan, np.float32)
    hover = np.zeros((*mosaic.shape, 5), np.float32)
    apart = np.arange(n_rows) - n_rows // 2
    for layer in range(n_layers):
        for head in range(n_heads):
            at = np.s_[layer * step : layer * step + n_rows, head * step : head * step + n_rows]
            mosaic[at] = np.sqrt(share[layer, head])
            hover[at] = np.stack(
                np.broadcast_arrays(
                    names[layer], head, apart[:, None], apart[None, :], share[layer, head]
                ),
                axis=-1,
            )
    largest = float(share.max() if most is None else most) ** 0.5
    ticks = np.linspace(0, largest, 5)
    bar = colorbar_of("share") | {
        "tickvals": ticks.tolist(),
        "ticktext": [f"{tick**2:.2g}" for tick in ticks],
    }
    cells = go.Heatmap(
        z=mosaic,
        zmin=0,
        zmax=largest or 1.0,
        customdata=hover,
        colorscale=SEQUENTIAL,
        colorbar=bar,
        hoverongaps=False,
        hovertemplate=(
            "L%{customdata[0]:.0f}H%{customdata[1]:.0f}<br>%{customdata[2]:+.0f} rows, "
            "%{customdata[3]:+.0f} columns<br>share %{customdata[4]:.3f}<extra></extra>"
        ),
    )
    side = int(np.clip(900 / (n_heads * step), 2, 7))
    place = {layer: row for row, layer in enumerate(names)}
    every = [(row, head) for row in place.values() for head in range(n_heads)]
    shapes = [_frame(row, head, step, INK, 1) for row, head in every]
    for head in heads_of(mark or []):
        if head.layer not in place or head.head >= n_heads:
            raise FigureError(f"mark: {head} is not in the atlas.")
        shapes.append(_frame(place[head.layer], head.head, step, PALETTE[1], 3))
    figure = new_figure(
        title,
        data=[cells],
        width=180 + n_heads * step * side,
        height=150 + n_layers * step * side,
        plot_bgcolor="white",
        paper_bgcolor="white",
        shapes=shapes,
    )
    middles = n_rows // 2 + step * np.arange(max(n_layers, n_heads))
    figure.update_xaxes(
        title="head", tickvals=middles[:n_heads].tolist(), ticktext=[*map(str, range(n_heads))],
        showgrid=False, showline=False, constrain="domain", ticks="",
    )  # fmt: skip
    figure.update_yaxes(
        title="layer", tickvals=middles[:n_layers].tolist(), ticktext=[str(n) for n in names],
        showgrid=False, showline=False, scaleanchor="x", constrain="domain", ticks="",
        range=[n_layers * step - 1.5 + 1, -1.5],
    )  # fmt: skip
    return figure


def _frame(layer: int, head: int, step: int, color: str, width: int) -> dict:
    return {
        "type": "rect",
        "x0": head * step - 0.5,
        "x1": (head + 1) * step - 1.5,
        "y0": layer * step - 0.5,
        "y1": (layer + 1) * step - 1.5,
        "line": {"color": color, "width": width},
    }
