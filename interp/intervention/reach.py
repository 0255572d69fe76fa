"""What a layer lets queries see, and which keys of a pass are which tokens of the text."""

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.intervention.base import InterventionError
from interp.model.attention import Attention
from interp.model.call import Call


def earlier(attention: Attention) -> Bool[Tensor, "query key"]:
    """Keys up to each query's own, padding among them."""
    columns = torch.arange(attention.n_keys, device=attention.q.device)
    return columns <= columns[attention.n_keys - attention.n_queries :, None]


def check_plainly_causal(attention: Attention, call: Call, who: str) -> None:
    """Raises `InterventionError` where the layer hides more than padding and what comes later.

    `who` wants to know.
    """
    if attention.rotary is None:
        raise InterventionError(
            f"{who}: this layer is not known to turn q and k by their position (learned positions, "
            "ALiBi, none at all; GPT-J's way), so keys can't be given others."
        )
    mask, plain = attention.mask, attention.n_keys >= call.real_keys.shape[1]
    if mask is not None and plain:
        expected = (earlier(attention) & attention.real_keys[:, None])[:, None]
        real = attention.real_queries[:, None, :, None]
        plain = mask.dtype == torch.bool and bool(((mask == expected) | ~real).all())
    if not plain or (mask is None and not attention.causal and attention.n_queries > 1):
        raise InterventionError(
            f"{who}: this layer's attention is not plainly causal (a window shorter than the text, "
            "or one that looks ahead), and which keys would be near is not settled there; give "
            "shorter prompts, or another model."
        )
