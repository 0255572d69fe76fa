"""Path patching: what one head says to chosen later ones, or to the logits, and to nobody else.

Activation patching lets a changed head reach everything after it. Here a sender s reaches a set R
of receivers only directly, or through MLPs on the way, in three passes:

1. take each head's z on the clean and on the corrupted prompt;
2. run the clean prompt with s at its corrupted z and *every other head frozen* at its clean z, MLPs
   recomputed (or frozen too), and take down what the receivers then read;
3. run the clean prompt with only these values in their places; all after them recomputes.

With m_c and m_r the metric on the clean and the corrupted prompt, and m_s that of pass 3,

    moved = (m_s - m_c) / (m_r - m_c)      0: s says nothing to R, 1: as if corrupted, < 0: it helps

The receivers "logits" read the last residual, so that pass 2 says it all. A receiving head reads by
its `component`: q, or k or v (those of its *key-value head*, which other heads may share), or z:
what all three make of it, worked out anew in pass 2 while what the receiver writes stays frozen.

With all z frozen nothing moves between tokens in pass 2: a change at a token stays there until pass
3. So pass 2 replays only from the first token patched on, many senders at once, and no further than
the last receiver.

Sources: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), appendix B; Merullo et
al. 2024 (arXiv 2310.08744) and its code, whose saved numbers are -100 times `moved`. Differences:
each pair's own last token instead of column -1, senders up to the *highest* receiver (a sender at
or above every receiver is unmoved, as it must be; one that is itself a receiver is NaN), and one
ratio over all pairs instead of a mean over batches of ratios.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
from datasets import Dataset

from interp.analysis.paired import Metric, PairError, check_pairs, metric_of
from interp.analysis.patching.activation import Patching
from interp.analysis.patching.grid import Position
from interp.analysis.patching.path_sweep import Component, Paths, Reading
from interp.analysis.patching.sweep import PAIRS_AT_ONCE
from interp.analysis.shards import in_shards
from interp.heads import Head, HeadsLike, heads_of
from interp.model.hooked import HookedModel
from interp.tasks.prompts import describe

Receivers = Literal["logits"] | HeadsLike


def path_patching(
    model: HookedModel,
    pairs: Dataset,
    receivers: Receivers = "logits",
    component: Component | None = None,
    *,
    senders: HeadsLike | None = None,
    sender_position: Position | None = None,
    receiver_position: Position | None = None,
    freeze_mlps: bool = False,
    metric: str | Metric = "logit_diff",
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Patching:
    """Patch the paths from each head by itself to all `receivers` together.

    Args:
        pairs: From `interp.tasks` (`ioi`, `pairs`, ...): clean and corrupted prompts.
        receivers: "logits", or heads, which read by their `component` ("q", "k", "v", "z").
        senders: Default: all heads; `layers` leaves out those of others.
        sender_position: Where the sender is patched: a named position of the pairs, a number from
            the end (-1 or "end": the last token), or None: at all tokens.
        receiver_position: Where receivers get what they read. None: wherever it changed, which for
            q, k and v is where the sender was patched (the one position of the papers' codes).
        freeze_mlps: Only the path that no MLP is on.
        metric: A name in `interp.analysis.paired.METRICS`, or a function of logits and `Answers`.
        batch_size: Patched prompts in one pass; default as many as are fast and fit the memory.
        out: Folder to keep finished pairs in: a killed run continues there.

    Returns:
        `Patching` with a cell for each sender; direction "noise", so that `moved` is as above.

    Raises:
        PairError: No component for receiving heads, an unknown metric or position, a model where
            tokens mix outside of attention heads.
        HeadError: Receivers, senders or layers that the model lacks.
        ReplayError: A model that cannot be replayed, or is in training mode.
    """
    check_pairs(pairs)
    name, function = metric_of(metric)
    reading = _receivers(model, receivers, component)
    _check(model, batch_size, sender_position, receiver_position)
    sending = _senders(model, senders, layers)
    cells = pd.DataFrame({"layer": [h.layer for h in sending], "head": [h.head for h in sending]})
    settings = {
        "analysis": "path_patching",
        "site": "z",
        "by": ["layer", "head"],
        "metric": name,
        "direction": "noise",
        "receivers": [str(head) for head in reading.heads] or "logits",
        "component": component,
        "sender_position": sender_position,
        "receiver_position": receiver_position,
        "freeze_mlps": freeze_mlps,
        "head_kind": "query",
        "task": describe(pairs),
        "cells": zlib.crc32(cells.to_json().encode()),
        **model.provenance(),
    }
    where = (sender_position, receiver_position)
    paths = Paths(model, reading, sending, where, freeze_mlps, function, batch_size)
    desc = "path patching" if progress else None
    table = in_shards(paths.run, pairs, PAIRS_AT_ONCE, settings, out, resume, desc)
    return Patching(
        cells,
        np.stack(table["values"].to_list()),
        table["clean"].to_numpy(float),
        table["corrupted"].to_numpy(float),
        settings,
    )


def _receivers(model: HookedModel, receivers: Receivers, component: Component | None) -> Reading:
    if isinstance(receivers, str) and receivers == "logits":
        if component is not None:
            raise PairError(f"component={component!r}: the logits have none; leave it out.")
        return Reading((), None, {})
    heads = tuple(sorted(heads_of(receivers)))
    if not heads:
        raise PairError("receivers: no heads; give some, or 'logits'.")
    if component not in get_args(Component):
        kinds = ", ".join(get_args(Component))
        raise PairError(f"component={component!r}: what the receiving heads read by, of {kinds}.")
    model.check_heads(heads)
    n_kv = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    group = model.cfg.n_heads // n_kv if component in ("k", "v") else 1
    by_layer: dict[int, set[int]] = defaultdict(set)
    for head in heads:
        by_layer[head.layer].add(head.head // group)
    model.check_hooks(f"blocks.{layer}.attn.hook_{component}" for layer in by_layer)
    return Reading(heads, component, {layer: sorted(own) for layer, own in by_layer.items()})


def _senders(
    model: HookedModel, senders: HeadsLike | None, layers: Sequence[int] | None
) -> list[Head]:
    chosen = model.attention_layers if layers is None else list(layers)
    model.check_layers(chosen)
    if senders is None:
        heads = [Head(layer, head) for layer in chosen for head in range(model.cfg.n_heads)]
    else:
        heads = [head for head in sorted(heads_of(senders)) if head.layer in chosen]
        model.check_heads(heads)
    if not heads:
        raise PairError("senders: no heads are left; give some, in `layers`.")
    return heads


def _check(model: HookedModel, batch_size: int | None, *positions: Position | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise PairError(f"batch_size={batch_size}: at least 1.")
    for position in positions:
        if isinstance(position, int) and position >= 0:
            raise PairError(
                f"position {position}: a name, or a number from the end (-1: the last token), as "
                "prompts may differ in length."
            )
    without = [n for n in range(len(model.blocks)) if n not in model.attention_layers]
    if without:
        raise PairError(
            f"model: block {without[0]} of {model.name} has no attention heads, so that freezing "
            "all heads does not keep tokens apart; path patching needs that."
        )
