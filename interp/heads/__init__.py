"""Heads and their scores: the currency between analysis passes, reports and interventions."""

from interp.heads.head import Head, HeadError
from interp.heads.overlap import Overlap, overlap_null
from interp.heads.scores import HeadScores, HeadsLike, heads_of
from interp.heads.table import ScoresError, as_numpy, mean_std_n

__all__ = [
    "Head",
    "HeadError",
    "HeadScores",
    "HeadsLike",
    "Overlap",
    "ScoresError",
    "as_numpy",
    "heads_of",
    "mean_std_n",
    "overlap_null",
]
