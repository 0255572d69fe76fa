"""Multiple choice: from an answer that is known to its letter."""

from interp.analysis.choices.letters import letter_attention, letter_heads
from interp.analysis.choices.logit_attribution import (
    direct_and_total,
    direct_effect,
    logit_attribution,
    swap_nodes,
    total_effect,
)

__all__ = [
    "direct_and_total",
    "direct_effect",
    "letter_attention",
    "letter_heads",
    "logit_attribution",
    "swap_nodes",
    "total_effect",
]
