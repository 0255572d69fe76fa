"""A map drawn over the image that it is of."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from interp.figures.look import PALETTE, FigureError, colorbar_of, new_figure

SIDE = 420  # pixels of the longer side


def overlay(
    image: Any,
    values: Float[np.ndarray, "row column"],
    *,
    region: Sequence[float] = (0, 0, 1, 1),
    boxes: Iterable[Sequence[float]] = (),
    title: str = "",
    colorbar: str = "map",
    opacity: float = 0.55,
) -> go.Figure:
    """`values` over a `PIL.Image`, each cell where it belongs.

    Args:
        region: The part of the image that the map covers; left, top, right, bottom from 0 to 1.
        boxes: Outlined; as `region`.
    """
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        raise FigureError(f"values: a map [row, column]; this has the shape {list(values.shape)}.")
    if not 0 <= opacity <= 1:
        raise FigureError(f"opacity={opacity}: from 0 to 1.")
    width, height = image.size
    left, top, right, bottom = region
    n_rows, n_columns = values.shape
    there = values[np.isfinite(values)]
    cells = go.Heatmap(
        z=values,
        x=width * np.linspace(left, right, n_columns + 1),  # the cells' edges
        y=height * np.linspace(top, bottom, n_rows + 1),
        zmin=min(0.0, float(there.min(initial=0.0))),
        zmax=max(float(there.max(initial=0.0)), 1e-12),
        colorscale="Inferno",
        opacity=opacity,
        colorbar=colorbar_of(colorbar),
        hovertemplate="x %{x:.0f}, y %{y:.0f}<br>" + colorbar + " %{z:.4g}<extra></extra>",
    )
    scale = SIDE / max(width, height)
    figure = new_figure(
        title, data=[cells], width=round(width * scale) + 160, height=round(height * scale) + 100
    )
    figure.add_layout_image(
        source=image, xref="x", yref="y", x=0, y=0, sizex=width, sizey=height, sizing="stretch",
        layer="below",
    )  # fmt: skip
    for x0, y0, x1, y1 in boxes:
        figure.add_shape(
            type="rect", x0=width * x0, x1=width * x1, y0=height * y0, y1=height * y1,
            line={"color": PALETTE[5], "width": 3},
        )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, width], constrain="domain")
    figure.update_yaxes(visible=False, range=[height, 0], scaleanchor="x", constrain="domain")
    return figure
