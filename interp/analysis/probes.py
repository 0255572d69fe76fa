"""Probes: how well a head's output tells two (or more) kinds of prompts apart.

With x_i[h] the output of head h at the last token of prompt i (before W_O), y_i in {0, 1} its label
and s_i = 2 y_i - 1, a logistic regression for each head by itself,

    min over w, b:   |w|^2 / 2 + C sum_i log(1 + exp(-s_i (w x_i + b)))

(the intercept is free, nothing is standardised, C = 1: what scikit-learn does by default). A head's
score is its *held-out accuracy*: each prompt is judged by a probe fitted on the other folds.
Prompts of one group (the answers to one question) are always in the same fold. More than two labels
are told apart by one such probe each, against the rest, and the one that is surest.

Source: Li et al. 2023, "Inference-Time Intervention" (arXiv 2306.03341), which holds out one fifth
once. A probe says what can be read off a head, not what the model reads.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from interp.errors import UserError
from interp.evaluation import prepared
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.tasks.continuations import statements
from interp.tasks.prompts import as_prompts, describe, spans_of

NEWTON_STEPS, HALVINGS = 100, 30


class ProbeError(UserError):
    """Labels that no probe can be fitted to."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Heads' outputs at the last token of prompts, float32 on the CPU, with labels and groups.

    `labels[i]` is an index into `classes`. `about` is what to say of the prompts.
    """

    z: Float[Tensor, "prompt layer head d_head"]
    labels: Int[Tensor, " prompt"]
    groups: Int[Tensor, " prompt"]
    classes: list[Hashable]
    layers: list[int]
    about: dict[str, Any]


def probe_heads(
    model: HookedModel,
    prompts,
    labels=None,
    *,
    groups=None,
    folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> HeadScores:
    """Held-out accuracy of a probe on every head; the samples are kept (1: judged right).

    Args:
        prompts: Anything that `as_prompts` reads.
        labels: One for each prompt, as a list or an array. None: the prompts have answers, and the
            question is whether a prompt is followed by its right answer or a wrong one
            (`statements`).
        groups: Which prompts belong together. Default: each is by itself (the answers to one prompt
            where labels are None).
        penalty: C in the module's docstring; a smaller one shrinks w more.

    Returns:
        `HeadScores`; `metadata["chance"]` is the share of the commonest label.

    Raises:
        ProbeError: Labels of one kind only, another number of them, fewer groups than folds.
    """
    found = labelled(model, prompts, labels, groups, batch_size=batch_size, progress=progress)
    return probe_scores(model, found, folds=folds, penalty=penalty, seed=seed, progress=progress)


def labelled(
    model: HookedModel,
    prompts,
    labels=None,
    groups=None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Labelled:
    """What every head says at the last token of each prompt; arguments as in `probe_heads`."""
    prompts = prepared(model, as_prompts(model, prompts))
    lists, told = [list(ids) for ids in prompts["input_ids"]], spans_of(prompts)
    lengths = [len(ids) for ids in lists]
    if labels is None:
        if groups is not None:
            raise ProbeError("groups: only with labels; answers are grouped by their prompt.")
        said = statements(model, prompts)
        lists, labels, groups = said.token_lists, said.labels, said.groups
        told = None if told is None else [told[n] for n in said.groups]
        lengths = [lengths[n] for n in said.groups]
    kinds, own = _checked("labels", labels, lists)
    if len(kinds) < 2:
        raise ProbeError(f"labels: all are {kinds[0]!r}; a probe needs two kinds.")
    _, together = _checked("groups", range(len(lists)) if groups is None else groups, lists)
    z = last_z(model, lists, told, lengths, batch_size, "z of heads" if progress else None)
    return Labelled(z, own, together, kinds, model.attention_layers, describe(prompts))


def last_z(
    model: HookedModel,
    token_lists: list[list[int]],
    spans: list[dict] | None = None,
    lengths: list[int] | None = None,
    batch_size: int = 8,
    desc: str | None = None,
) -> Float[Tensor, "prompt layer head d_head"]:
    """z of every head at the last token of each list, float32 on the CPU.

    `spans` and `lengths` are told to interventions (`HookedModel.spans`).
    """
    layers = model.attention_layers
    found = torch.empty(len(token_lists), len(layers), model.cfg.n_heads, model.cfg.d_head)
    index = torch.empty(0)

    def keep(z: Tensor, hook, row: int) -> None:
        found[index, row] = z[:, -1].float().cpu()

    hooks = [
        (f"blocks.{layer}.attn.hook_z", partial(keep, row=row)) for row, layer in enumerate(layers)
    ]
    with model.hooks(fwd_hooks=hooks):
        for batch in model.batches(token_lists, batch_size, desc):
            index = batch.index
            told = None if spans is None else [spans[i] for i in index.tolist()]
            own = None if lengths is None else [lengths[i] for i in index.tolist()]
            with model.spans(told, own):
                model.run(batch.input_ids, batch.attention_mask)
    return found


def probe_scores(
    model: HookedModel,
    found: Labelled,
    *,
    folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """`probe_heads` on what heads were found to say."""
    if not penalty > 0:
        raise ProbeError(f"penalty={penalty}: above 0; a smaller one shrinks the weights more.")
    fold_of = folds_of(found.labels, found.groups, folds, seed)
    right = torch.zeros(found.z.shape[:3])
    bar = tqdm(found.layers, desc="probes", disable=not progress, leave=False)
    for row, _ in enumerate(bar):
        x = found.z[:, row].transpose(0, 1).double()  # [head prompt d_head]
        for fold in range(folds):
            out = fold_of == fold
            told = _told(x[:, ~out], found.labels[~out], x[:, out], len(found.classes), penalty)
            right[out, row] = (told == found.labels[out]).T.float()
    counts = found.labels.bincount()
    return HeadScores.from_samples(
        right,
        layers=found.layers,
        keep_samples=True,
        analysis="probe_heads",
        folds=folds,
        penalty=penalty,
        seed=seed,
        classes=[str(kind) for kind in found.classes],
        chance=float(counts.max() / counts.sum()),
        task=found.about,
        **model.provenance(),
    )


def logistic(
    x: Float[Tensor, "head sample d_head"], y: Bool[Tensor, " sample"], penalty: float
) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, " head"]]:
    """w and b of the module's docstring for every head at once, by Newton's method in float64."""
    x = torch.cat([x.double(), torch.ones_like(x[..., :1], dtype=torch.float64)], dim=-1)
    target, sign = y.double(), 2 * y.double() - 1
    ridge = torch.ones_like(x[0, 0])
    ridge[-1] = 0  # the intercept is free
    # keeps the curvature of a free intercept above 0; the minimum is where it was
    safety = torch.diag(ridge + 1e-8 * (1 - ridge))

    def cost(beta: Tensor) -> Tensor:
        margin = sign * torch.einsum("hnd,hd->hn", x, beta)
        return (ridge * beta**2).sum(-1) / 2 + penalty * softplus(-margin).sum(-1)

    beta = x.new_zeros(len(x), x.shape[-1])
    value = cost(beta)
    for _ in range(NEWTON_STEPS):
        p = torch.einsum("hnd,hd->hn", x, beta).sigmoid()
        slope = ridge * beta + penalty * torch.einsum("hnd,hn->hd", x, p - target)
        curvature = penalty * (x.mT * (p * (1 - p))[:, None]) @ x + safety
        step = torch.linalg.solve(curvature, slope)
        gain = (slope * step).sum(-1)  # twice what the step promises
        if (gain <= 1e-12 * (1 + value)).all():
            break
        beta, value = _go(cost, beta, value, step, gain)
    return beta[:, :-1], beta[:, -1]


def folds_of(
    labels: Int[Tensor, " prompt"], groups: Int[Tensor, " prompt"], folds: int, seed: int
) -> Int[Tensor, " prompt"]:
    """Each prompt's fold: groups stay together, and labels are spread evenly.

    Raises `ProbeError` where a fold would leave a label out of the others.
    """
    n_groups = int(groups.max()) + 1
    if not 2 <= folds <= n_groups:
        raise ProbeError(f"folds={folds}: from 2 to {n_groups}, the number of groups of prompts.")
    first = [int((groups == group).int().argmax()) for group in range(n_groups)]
    shuffled = np.random.default_rng(seed).permutation(n_groups)
    # by label, in random order within: every fold gets its share of each
    order = sorted(shuffled.tolist(), key=lambda group: int(labels[first[group]]))
    fold_of_group = torch.empty(n_groups, dtype=torch.long)
    fold_of_group[order] = torch.arange(n_groups) % folds
    fold_of = fold_of_group[groups]
    for fold in range(folds):
        if len(labels[fold_of != fold].unique()) < len(labels.unique()):
            raise ProbeError(
                f"labels: one kind is in a single fold of {folds} only; give more prompts of it."
            )
    return fold_of


def _told(
    x: Float[Tensor, "head sample d_head"],
    labels: Int[Tensor, " sample"],
    new: Float[Tensor, "head other d_head"],
    n_classes: int,
    penalty: float,
) -> Int[Tensor, "head other"]:
    """The labels that probes fitted on `x` give to `new`."""
    asked = [1] if n_classes == 2 else range(n_classes)
    fitted = [logistic(x, labels == kind, penalty) for kind in asked]
    sure = torch.stack([torch.einsum("hnd,hd->hn", new, w) + b[:, None] for w, b in fitted])
    return (sure[0] > 0).long() if n_classes == 2 else sure.argmax(0)


def _go(cost, beta: Tensor, value: Tensor, step: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step for every head, halved for as long as a head's cost does not fall."""
    size = torch.ones_like(value)
    for _ in range(HALVINGS):
        trial = cost(beta - size[:, None] * step)
        worse = trial > value - 1e-4 * size * gain + 1e-14 * value
        if not worse.any():
            break
        size = torch.where(worse, size / 2, size)
    size = torch.where(worse, 0.0, size)
    beta = beta - size[:, None] * step
    return beta, cost(beta)


def _checked(
    name: str, values: Any, token_lists: list
) -> tuple[list[Hashable], Int[Tensor, " prompt"]]:
    """The kinds of labels or groups, sorted, and each prompt's as a number."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(values) != len(token_lists):
        raise ProbeError(
            f"{name}: {len(values)} for {len(token_lists)} prompts; give one for each."
        )
    kinds = sorted(set(values), key=lambda kind: (type(kind).__name__, kind))
    number = {kind: n for n, kind in enumerate(kinds)}
    return kinds, torch.tensor([number[value] for value in values])
