"""How much each head matters for a task, one head at a time: the first step of finding a circuit.

Each function takes (model, pairs, metric, progress) and gives `HeadScores`: how much of the gap
between the clean and the corrupted prompt the head moves the metric (1: all of it; below 0: it
works against the answer).
"""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from interp.analysis.circuits.keeping import Kept
from interp.analysis.paired import in_pair_batches, metric_of
from interp.analysis.patching.activation import activation_patching
from interp.heads import Head, HeadScores
from interp.model.hooked import HookedModel

Scorer = Callable[..., HeadScores]


def by_patching(model, pairs: Dataset, metric, progress: bool) -> HeadScores:
    """What each head moves by itself when its z is the corrupted prompt's: exact."""
    found = activation_patching(
        model, pairs, "z", ("layer", "head"), metric, direction="noise", progress=progress
    )
    return found.heads


def by_attribution(model, pairs: Dataset, metric, progress: bool) -> HeadScores:
    """The same to first order, with gradients averaged along the way (5 steps)."""
    from interp.analysis.patching.attribution import attribution_patching

    found = attribution_patching(
        model, pairs, "z", ("layer", "head"), metric, direction="noise", ig_steps=5,
        progress=progress,
    )  # fmt: skip
    return found.heads


def by_paths(model, pairs: Dataset, metric, progress: bool, fraction: float = 0.02) -> HeadScores:
    """Path patching backwards: to the logits, to the queries of the heads found there, and to the
    values of the heads found next; a head's score is the largest |moved| of the three stages.

    In each stage the top `fraction` of heads become the receivers of the next (Merullo et al.).
    """
    from interp.analysis.patching.paths import path_patching

    options = {"metric": metric, "progress": progress}
    stages = [path_patching(model, pairs, "logits", sender_position="end", **options).heads]
    for component, position in (("q", "end"), ("v", None)):
        receivers = [head for head in by_strength(stages[-1]) if head.layer > 0]
        receivers = receivers[: max(1, round(fraction * len(stages[0])))]
        stages.append(
            path_patching(
                model, pairs, receivers, component, sender_position=position, **options
            ).heads
        )
    moved = np.stack([np.nan_to_num(stage.matrix) for stage in stages])
    strongest = np.take_along_axis(moved, np.abs(moved).argmax(0)[None], axis=0)[0]
    table = stages[0].table.drop(columns=["std"])
    table["score"] = strongest[table["layer"], table["head"]]
    for name, stage in zip(("to_logits", "to_queries", "to_values"), moved, strict=True):
        table[name] = stage[table["layer"], table["head"]]
    return HeadScores(table, {**stages[0].metadata, "analysis": "paths", "fraction": fraction})


def by_greedy(
    model: HookedModel, pairs: Dataset, metric, progress: bool, threshold: float = 0.01
) -> HeadScores:
    """Taken out one after the other, from the last layer back: what each costs when its turn comes.

    A head that costs less than `threshold` of the gap stays out for good, as in ACDC, there with
    edges for heads (Conmy et al. 2023); the order within a layer is that of the heads.
    """
    _, function = metric_of(metric)
    kept = [Kept.of(model, batch, function) for batch in in_pair_batches(model, pairs, 16)]
    mask = torch.ones(len(model.blocks), model.cfg.n_heads, dtype=torch.bool)
    whole = torch.cat([one.values(mask[None])[0] for one in kept])
    gap = float((whole - torch.cat([one.corrupted for one in kept])).mean())
    costs = torch.full((len(whole), *mask.shape), torch.nan)
    current = whole
    heads = [
        (layer, head) for layer in reversed(model.attention_layers) for head in range(mask.shape[1])
    ]
    for layer, head in tqdm(heads, desc="greedy", disable=not progress, leave=False):
        mask[layer, head] = False
        without = torch.cat([one.values(mask[None])[0] for one in kept])
        costs[:, layer, head] = (current - without) / gap
        if abs(float(costs[:, layer, head].mean())) < threshold:
            current = without
        else:
            mask[layer, head] = True
    costs = costs[:, model.attention_layers]
    return HeadScores.from_samples(
        costs, layers=model.attention_layers, keep_samples=True, analysis="greedy",
        threshold=threshold, **model.provenance(),
    )  # fmt: skip


def by_strength(scores: HeadScores) -> list[Head]:
    """Heads by falling |score|; a head that works against the answer is part of the circuit too."""
    table = scores.table
    strength = HeadScores(table.assign(score=table["score"].abs()), scores.metadata)
    return strength.top(int(strength.table["score"].notna().sum()))


METHODS: dict[str, Scorer] = {
    "patching": by_patching,
    "attribution": by_attribution,
    "paths": by_paths,
    "greedy": by_greedy,
}
