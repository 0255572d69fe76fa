"""Figures say what their arrays say: positions, labels, ranges and hovers."""

import base64

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from interp import figures
from interp.figures import FigureError, look
from interp.heads import HeadScores

TOKENS = ["<s>", " the", " cat", " saw", " the", " cat"]


def causal(n_panels: int, n: int) -> np.ndarray:
    weights = np.tril(np.random.default_rng(0).random((n_panels, n, n)))
    return weights / weights.sum(-1, keepdims=True)


def array(value) -> np.ndarray:
    """What plotly holds for an array, decoded if it is on its way to the page."""
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = value.get("shape")
        return flat.reshape([int(n) for n in shape.split(",")]) if shape else flat
    return np.asarray(value)


def test_repeated_tokens_keep_their_own_columns():
    pattern = causal(2, 6)
    figure = figures.attention_pattern(pattern, TOKENS, ["L3H0", "L3H5"])
    for cells, weights in zip(figure.data, pattern, strict=True):
        np.testing.assert_allclose(cells.z, 100 * weights, rtol=1e-6)
        assert cells.x.tolist() == cells.y.tolist() == list(range(6))
    axis = figure.layout.xaxis
    assert list(axis.tickvals) == list(range(6))
    assert list(axis.ticktext) == ["&lt;s&gt;", "the", "cat", "saw", "the", "cat"]


def test_the_first_query_is_on_top_and_panels_share_their_colours():
    figure = figures.attention_pattern(causal(2, 6), TOKENS, ["L3H0", "L3H5"])
    assert list(figure.layout.yaxis.range) == [5.5, -0.5]
    assert {cells.coloraxis for cells in figure.data} == {"coloraxis"}
    assert figure.layout.coloraxis.cmin == 0
    assert [note.text for note in figure.layout.annotations] == ["L3H0", "L3H5"]


def test_last_queries_and_blocks_stand_at_their_places_in_the_prompt():
    figure = figures.attention_pattern(causal(1, 6)[:, 4:], TOKENS)
    assert figure.data[0].y.tolist() == [4, 5]
    assert list(figure.layout.yaxis.ticktext) == ["the", "cat"]
    figure = figures.attention_pattern(
        np.ones((1, 1, 2)) / 2, ["b", "c"], query_tokens=["z"], first_query=9, first_key=3
    )
    assert figure.data[0].x.tolist() == [3, 4] and figure.data[0].y.tolist() == [9]
    assert figure.data[0].customdata.tolist() == [[[9, 3], [9, 4]]]


def test_many_tokens_get_fewer_labels_with_their_positions_and_a_byte_a_cell():
    pattern = causal(1, 200)
    figure = figures.attention_pattern(pattern, [f" w{i}" for i in range(200)])
    axis = figure.layout.xaxis
    assert len(axis.tickvals) <= look.MAX_LABELS
    assert axis.ticktext[1] == f"{axis.tickvals[1]}: w{axis.tickvals[1]}"
    sent = figure.to_plotly_json()["data"][0]["z"]
    assert sent["dtype"] == "u1"
    np.testing.assert_array_equal(array(sent), np.round(100 * pattern[0]))


def test_patterns_may_be_tensors_of_low_precision():
    figure = figures.attention_pattern(torch.eye(6, dtype=torch.bfloat16)[None], TOKENS)
    np.testing.assert_array_equal(figure.data[0].z, 100 * np.eye(6))


@pytest.mark.parametrize(
    "pattern, tokens, titles, words",
    [
        (np.ones((1, 2, 3)), ["a"], None, "tokens: 1 for 3 keys"),
        (np.ones((2, 1, 1)), ["a"], ["L0H0"], "titles: 1 for 2"),
        (np.ones((1, 501, 501)), ["a"] * 501, None, "at most 500 tokens.*block"),
    ],
)
def test_patterns_that_cannot_be_drawn_say_why(pattern, tokens, titles, words):
    with pytest.raises(FigureError, match=words):
        figures.attention_pattern(pattern, tokens, titles)


@pytest.mark.parametrize(
    "token, label",
    [
        ("Ġthe", "the"),
        ("▁the", "the"),
        ("\n\n", "⏎⏎"),
        (" ", "␣"),
        ("", "∅"),
        ("<|end|>", "&lt;|end|&gt;"),
        ("$x$", "&#36;x&#36;"),
        ("a" * 30, "a" * 13 + "…"),
    ],
)
def test_tokens_are_shown_as_text_and_never_as_markup(token, label):
    assert figures.shown(token) == label


def test_head_map_has_layer_0_on_top_and_leaves_unscored_heads_empty():
    matrix = np.array([[0.1, np.nan, 0.3], [0.4, 0.5, 0.6]])
    counts = np.array([[5, 0, 5], [5, 5, 5]])
    figure = figures.head_map(matrix, "retrieval", counts=counts, mark=["L1H2"])
    cells = figure.data[0]
    np.testing.assert_array_equal(cells.z, matrix.astype(np.float32))
    assert cells.x.tolist() == [0, 1, 2] and cells.y.tolist() == [0, 1]
    assert list(figure.layout.yaxis.range) == [1.5, -0.5]
    assert (cells.zmin, cells.zmax) == pytest.approx((0, 0.6))
    assert cells.hovertemplate.startswith("L%{y}H%{x}") and "n %{customdata}" in cells.hovertemplate
    (outline,) = figure.layout.shapes
    assert (outline.x0, outline.x1, outline.y0, outline.y1) == (1.5, 2.5, 0.5, 1.5)
    assert figure.to_plotly_json()["data"][0]["z"]["dtype"] == "f4"


def test_effects_are_centred_on_0():
    cells = figures.head_map(np.array([[-0.5, 2.0]]), diverging=True).data[0]
    assert (cells.zmin, cells.zmax) == (-2, 2)


@pytest.mark.parametrize("matrix", [np.zeros((2, 3)), np.full((2, 3), np.nan), np.ones((1, 1))])
@pytest.mark.parametrize("diverging", [False, True])
def test_head_maps_of_nothing_special_are_drawn(matrix, diverging):
    cells = figures.head_map(matrix, diverging=diverging).data[0]
    assert cells.zmin < cells.zmax


def test_marks_off_the_map_are_refused():
    with pytest.raises(FigureError, match=r"L5H0 is not on the map of layers 0-1, heads 0-2"):
        figures.head_map(np.zeros((2, 3)), mark=["5.0"])


def test_scores_plot_themselves():
    samples = np.random.default_rng(0).random((3, 2, 4))
    scores = HeadScores.from_samples(samples, analysis="retrieval_heads", model="toy")
    figure = scores.plot(mark=scores.top(1))
    assert figure.layout.title.text == "retrieval heads of toy"
    np.testing.assert_allclose(figure.data[0].z, scores.matrix, rtol=1e-6)
    assert (figure.data[0].customdata == 3).all()
    assert len(figure.layout.shapes) == 1


def test_profile_draws_each_series_with_its_band_and_names_the_peaks():
    values = np.full(50, 0.01)
    values[[0, 40]] = [0.9, 0.1]
    values[20:26] = np.linspace(0.5, 0.3, 6)  # a slope is no peak, however high
    tokens = [f" w{i}" for i in range(50)]
    figure = figures.profile(
        np.arange(50), values, tokens=tokens, low=values / 2, high=values * 2, peaks=3
    )
    band, line, names = figure.data
    assert band.fill == "toself" and len(band.x) == 100
    np.testing.assert_allclose(line.y, values, rtol=1e-6)
    assert list(names.x) == [0, 20, 40] and list(names.text) == ["w0", "w20", "w40"]


def test_profile_takes_the_columns_of_a_long_table():
    table = pd.DataFrame(
        {"position": [1, 0, 0, 1], "received": [0.1, 0.2, 0.3, 0.4], "layer": [3, 3, 4, 4]}
    )
    figure = figures.profile(table["position"], table["received"], series=table["layer"])
    assert [line.name for line in figure.data] == ["3", "4"]
    np.testing.assert_allclose(figure.data[0].y, [0.2, 0.1], rtol=1e-6)
    assert list(figure.data[0].x) == [0, 1]
    assert figure.layout.showlegend
    with pytest.raises(FigureError, match=r"one length, not position 4, value 3"):
        figures.profile([0, 1, 2, 3], [1, 2, 3])


def test_grid_writes_each_number_into_its_own_cell():
    table = pd.DataFrame(
        {
            "length": [512, 256, 256],
            "depth": [0.0, 0.0, 0.5],
            "accuracy": [0.25, 1.0, 0.5],
            "n": [4, 20, 20],
        }
    )
    figure = figures.grid(table, "length", "depth", "accuracy", "n")
    cells = figure.data[0]
    np.testing.assert_array_equal(cells.z, [[1.0, 0.25], [0.5, np.nan]])
    assert cells.text[0][1].startswith("0.25") and "n=4" in cells.text[0][1]
    assert cells.text[1][1] == ""
    assert list(figure.layout.xaxis.ticktext) == ["256", "512"]
    assert list(figure.layout.yaxis.ticktext) == ["0", "0.5"]
    assert (cells.zmin, cells.zmax) == (0, 1)


def test_grid_refuses_rows_for_one_cell_and_missing_columns():
    table = pd.DataFrame({"length": [1, 1], "depth": [0, 0], "accuracy": [0.1, 0.2]})
    with pytest.raises(FigureError, match=r"share one length and depth"):
        figures.grid(table, "length", "depth", "accuracy")
    with pytest.raises(FigureError, match=r"lacks the columns loss; it has length"):
        figures.grid(table, "length", "depth", "loss")


def test_conditions_have_a_panel_for_each_metric_and_their_intervals():
    table = pd.DataFrame(
        [
            ("none", "accuracy", 0.9, 0.8, 0.95, 50),
            ("top", "accuracy", 0.1, 0.05, 0.2, 50),
            ("none", "loss", 3.0, 2.9, 3.1, 50),
            ("top", "loss", 3.2, 3.1, 3.4, 50),
        ],
        columns=["condition", "metric", "value", "low", "high", "n"],
    )
    draws = pd.DataFrame({"condition": ["top"], "metric": ["loss"], "value": [3.6]})
    figure = figures.conditions(table, draws=draws)
    accuracy, loss = figure.data[1], figure.data[3]
    assert list(accuracy.x) == [0.9, 0.1] and list(accuracy.y) == [0, 1]
    np.testing.assert_allclose(accuracy.error_x.array, [0.05, 0.1])
    np.testing.assert_allclose(accuracy.error_x.arrayminus, [0.1, 0.05])
    assert list(figure.data[2].x) == [3.6] and loss.xaxis == "x2"
    assert list(figure.layout.yaxis.ticktext) == ["none", "top"]
    assert figure.layout.xaxis.range[0] < 0 and figure.layout.xaxis.range[1] > 1
    assert figure.layout.xaxis2.range[0] < 2.9 and figure.layout.xaxis2.range[1] > 3.6


def test_scatter_and_histogram_hold_their_points():
    figure = figures.scatter(np.arange(3), np.arange(3) * 2, ["L0H0", "L0H1", "L0H2"])
    assert list(figure.data[0].text) == ["L0H0", "L0H1", "L0H2"]
    with pytest.raises(FigureError, match="one length"):
        figures.scatter(np.arange(3), np.arange(3), ["L0H0"])
    figure = figures.histogram(np.array([0.0, 0.1, 0.9, np.nan]), bins=2, threshold=0.5)
    assert list(figure.data[0].y) == [2, 1]
    assert figure.layout.shapes[0].x0 == 0.5


def test_every_figure_wears_the_house_template():
    drawn = [
        figures.head_map(np.ones((2, 2)), "a"),
        figures.attention_pattern(causal(1, 6), TOKENS),
        figures.profile([0, 1], [0.5, 0.5]),
        figures.histogram(np.ones(3)),
    ]
    for figure in drawn:
        assert isinstance(figure, go.Figure)
        assert list(figure.layout.template.layout.colorway) == look.PALETTE
        assert figure.layout.template.layout.title.xanchor == "left"
