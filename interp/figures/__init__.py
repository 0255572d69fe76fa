"""Figures: arrays and tables in, plotly figures out, all in one look.

Conventions: layer 0 at the top and heads across; queries down and keys across; a diverging scale
centred on 0 for effects, a sequential one from 0 for everything else. Tokens sit at integer
positions with their text as tick labels, since plotly would merge equal labels into one column.
"""

from interp.figures.atlas import offset_atlas
from interp.figures.lines import conditions, faithfulness_curve, histogram, profile, scatter
from interp.figures.look import (
    FAINT,
    INK,
    NOTHING,
    PALETTE,
    TEMPLATE,
    FigureError,
    shown,
    token_ticks,
)
from interp.figures.maps import (
    attention_pattern,
    effects,
    grid,
    head_map,
    head_maps,
    position_map,
)
from interp.figures.overlay import overlay

__all__ = [
    "FAINT",
    "INK",
    "NOTHING",
    "PALETTE",
    "TEMPLATE",
    "FigureError",
    "attention_pattern",
    "conditions",
    "effects",
    "faithfulness_curve",
    "grid",
    "head_map",
    "head_maps",
    "histogram",
    "offset_atlas",
    "overlay",
    "position_map",
    "profile",
    "scatter",
    "shown",
    "token_ticks",
]
