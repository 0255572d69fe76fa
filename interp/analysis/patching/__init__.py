"""Patching: copy values from one run into another, one cell, estimate or path at a time."""

from interp.analysis.patching.activation import Patching, activation_patching
from interp.analysis.patching.attribution import attribution_patching, compare_estimate
from interp.analysis.patching.noise import Noise
from interp.analysis.patching.paths import path_patching

__all__ = [
    "Noise",
    "Patching",
    "activation_patching",
    "attribution_patching",
    "compare_estimate",
    "path_patching",
]
