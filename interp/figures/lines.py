"""Figures with axes of numbers: lines over positions, intervals, clouds, histograms, curves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Shaped
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from interp.figures.look import (
    FAINT,
    INK,
    PALETTE,
    FigureError,
    dress,
    labels_at,
    need_columns,
    new_figure,
    scale,
    shown,
)
from interp.heads import as_numpy


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
    figure = new_figure(title, width=880)
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
    figure.update_yaxes(title=y_title, **scale(log))
    if not log and (table["value"] >= 0).all():
        figure.update_yaxes(rangemode="tozero")
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
    need_columns(table, ["condition", "metric", "value", "low", "high", "n"])
    if draws is not None:
        need_columns(draws, ["condition", "metric", "value"])
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
    dress(figure, title, width=240 + 330 * len(metrics), height=130 + 58 * len(names))
    figure.update_layout(showlegend=False)
    figure.update_yaxes(**labels_at(names), showgrid=False, range=[len(names) - 0.5, -0.6])
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
    figure = new_figure(title, width=520, height=460)
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
    figure = new_figure(title, data=[bars], width=620, height=360, bargap=0)
    figure.update_xaxes(title=x_title, showgrid=False)
    figure.update_yaxes(title=y_title, **scale(log))
    if threshold is not None:
        figure.add_vline(
            threshold,
            line={"color": PALETTE[1], "dash": "dash"},
            annotation_text=f"{threshold:g}",
            annotation_font_color=PALETTE[1],
        )
    return figure


def faithfulness_curve(
    curve: pd.DataFrame, tested: pd.DataFrame | None = None, *, title: str = ""
) -> go.Figure:
    """Faithfulness against the number of heads kept, and what is left without them.

    `curve` has `size, faithfulness, low, high, complement, complement_low, complement_high`. Of
    `tested` the first row is the circuit (a large dot), the others random ones (grey dots).
    """
    need_columns(curve, ["size", "faithfulness", "low", "high", "complement"])
    there = curve[curve["size"] > 0]
    lines = {
        "only these heads": ("faithfulness", "low", "high"),
        "without these heads": ("complement", "complement_low", "complement_high"),
    }
    figure = new_figure(title, width=760, height=420)
    for color, (name, columns) in zip(PALETTE, lines.items()):
        line = there[["size", *columns]].set_axis(["position", "value", "low", "high"], axis=1)
        figure.add_trace(_band(line, color, name))
        figure.add_trace(_line(line, color, name, False, "faithfulness"))
    if tested is not None:
        dots = (
            ("random heads", tested.iloc[1:], "#8A8A8A", 7),
            ("circuit", tested.iloc[:1], INK, 13),
        )
        for name, rows, color, size in dots:
            figure.add_trace(
                go.Scatter(
                    x=rows["size"], y=rows["faithfulness"], mode="markers", name=name,
                    marker={"color": color, "size": size},
                    hovertemplate=f"{name}<br>%{{x}} heads<br>%{{y:.3g}}<extra></extra>",
                )
            )  # fmt: skip
    figure.add_hline(1, line={"color": FAINT, "dash": "dot"})
    figure.update_xaxes(title="heads", type="log", showgrid=False, tickvals=_round_sizes(there))
    figure.update_yaxes(title="share of the task", rangemode="tozero")
    return figure


def _round_sizes(curve: pd.DataFrame) -> list[int]:
    largest = int(curve["size"].max())
    return [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if n < largest] + [largest]


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
