"""The heads an edit is for, where None means every head of the model; and how that is said."""

from collections import defaultdict
from typing import get_args

from interp.heads import Head, HeadsLike, heads_of
from interp.intervention.base import InterventionError
from interp.model.call import When
from interp.model.hooked import HookedModel


def chosen(heads: HeadsLike | None) -> tuple[Head, ...] | None:
    """In order and without doubles; None stays None."""
    return None if heads is None else tuple(sorted(heads_of(heads)))


def by_layer(model: HookedModel, heads: tuple[Head, ...] | None) -> dict[int, list[int]]:
    """Layer -> which of its heads. Raises `HeadError` where the model lacks one."""
    if heads is None:
        return {layer: list(range(model.cfg.n_heads)) for layer in model.attention_layers}
    model.check_heads(heads)
    found = defaultdict(list)
    for head in heads:
        found[head.layer].append(head.head)
    return dict(found)


def check_when(when: str) -> None:
    """Raises `InterventionError` unless it is one of prompt, generated, both."""
    if when not in get_args(When):
        raise InterventionError(f"when={when!r}: one of {', '.join(get_args(When))}.")


def said(heads: tuple[Head, ...] | None) -> str:
    """In words: "3 heads: L0H1, L0H2, L1H3", "no heads", "all heads"."""
    if heads is None:
        return "all heads"
    shown = ", ".join(map(str, heads[:4])) + (", ..." if len(heads) > 4 else "")
    return f"{len(heads)} heads: {shown}" if heads else "no heads"


def said_when(when: str) -> str:
    """In words: "at the prompt's tokens"."""
    which = {"both": "all", "prompt": "the prompt's"}.get(when, when)
    return f"at {which} tokens"
