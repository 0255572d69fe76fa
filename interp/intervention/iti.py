"""ITI: push chosen heads along a direction that tells right from wrong, measured, not learned.

With z_t[h] the output of head h at token t (before W_O), theta[h] a unit vector and sigma[h] the
standard deviation of the head's outputs along it,

    z_t[h] <- z_t[h] + alpha sigma[h] theta[h]

for the heads whose probes tell right from wrong best (`interp.probe_heads`). theta is the mean of
the right minus the mean of the wrong ("mass_mean"), the probe's own weights ("probe"), or drawn at
random, the control ("random"). sigma is taken over a bank of prompts, labels unused: the closer
these are to the text that will be edited, the better alpha means what it says.

Source: Li et al. 2023, "Inference-Time Intervention: Eliciting Truthful Answers from a Language
Model" (arXiv 2306.03341) and its code: alpha 15, 48 of 1,024 heads, at the prompt's last token and
at generated ones. Differences: heads are ranked by accuracy over all folds instead of one fifth of
the questions, and no activation of test prompts goes into sigma.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from interp.analysis.probes import labelled, last_z, logistic, probe_scores
from interp.heads import Head, HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import said
from interp.intervention.folding import FoldError, fold_offsets
from interp.intervention.offsets import (
    At,
    by_layer,
    check_fits,
    check_settings,
    check_width,
    in_order,
    offset_hooks,
    said_of_size,
    said_of_tokens,
    top_heads,
)
from interp.model.call import When
from interp.model.hooked import HookedModel
from interp.tasks.prompts import as_prompts, spans_of

Direction = Literal["mass_mean", "probe", "random"]


@dataclass(frozen=True, eq=False, repr=False)
class ITI(Intervention):
    """Push z of `heads[i]` by `strength` times `spreads[i]` along the unit vector `directions[i]`.

    `at="end"` edits what a next token is read from: the prompt's last token (`when="prompt"`),
    generated tokens ("generated"), or these ("both"); `at="all"` all tokens of these kinds. Without
    its KV cache Hugging Face's `generate` reads all it wrote as a prompt, whose last token then
    moves on: with `at="end"` the result is another than with the cache.
    """

    heads: HeadsLike
    directions: Float[Tensor, "head d_head"]
    spreads: Float[Tensor, " head"]
    strength: float = 15.0
    when: When = "both"
    at: At = "end"

    def __post_init__(self):
        check_width("directions", self.directions)
        check_settings(self.when, self.at, self.strength)
        given = {"directions": self.directions, "spreads": self.spreads}
        heads, ordered = in_order(self.heads, given)
        if self.spreads.dim() != 1 or (self.spreads < 0).any():
            raise InterventionError("spreads: one number a head, none below 0.")
        if ((self.directions.double().norm(dim=1) - 1).abs() > 1e-3).any():
            raise InterventionError("directions: not of length 1; divide each by its norm.")
        object.__setattr__(self, "heads", heads)
        for name, value in ordered.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"ITI({said(self.heads)}; pushed {self.strength:g} standard deviations; "
            f"{said_of_tokens(self.when, self.at)})"
        )

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        labels=None,
        heads: HeadsLike | None = None,
        *,
        k: int | float = 0.05,
        direction: Direction = "mass_mean",
        spread_over=None,
        strength: float = 15.0,
        when: When = "both",
        at: At = "end",
        groups=None,
        folds: int = 5,
        seed: int = 0,
        batch_size: int = 8,
        progress: bool = True,
    ) -> "ITI":
        """Directions from `prompts` and their labels, on `heads` or the `k` best of the probes.

        Args:
            prompts: As in `probe_heads`, labels and groups too.
            labels: Two kinds; the push is towards the greater (1, True). None: towards right
                answers, away from wrong ones.
            k: How many heads; a float is a share of all of them.
            direction: As in the module's docstring.
            spread_over: Prompts over which sigma is taken; None: the labelled ones.
            strength: alpha. The authors' 15 is for 7B models: try 0, 5, 10, 15, 20 on held-out
                prompts.

        Raises:
            InterventionError: Another direction; labels of more than two kinds.
            ProbeError: As `probe_heads`.
        """
        if direction not in get_args(Direction):
            raise InterventionError(
                f"direction={direction!r}: one of {', '.join(get_args(Direction))}."
            )
        check_settings(when, at, strength)
        found = labelled(model, prompts, labels, groups, batch_size=batch_size, progress=progress)
        if len(found.classes) != 2:
            raise InterventionError(
                f"labels: {len(found.classes)} kinds, and a push needs two: away from the smaller, "
                "towards the greater."
            )
        if heads is None:
            scores = probe_scores(model, found, folds=folds, seed=seed, progress=progress)
            heads = top_heads(scores, k)
        heads = tuple(sorted(heads_of(heads)))
        model.check_heads(heads)
        z = of_heads(found.z, heads, found.layers)
        directions = directions_of(z, found.labels, direction, seed, heads)
        if spread_over is not None:
            bank = as_prompts(model, spread_over)
            lists, told = list(bank["input_ids"]), spans_of(bank)
            z = of_heads(last_z(model, lists, told, None, batch_size), heads, found.layers)
        spreads = torch.einsum("nhd,hd->nh", z, directions).std(0, correction=0)
        return cls(heads, directions, spreads, strength, when, at)

    @property
    def vectors(self) -> Float[Tensor, "head d_head"]:
        """What is added to z of each head."""
        return self.strength * self.spreads[:, None] * self.directions

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched.

        Raises `HeadError` where the model lacks a head, `InterventionError` where its heads are of
        another width.
        """
        return offset_hooks(model, self.heads, self.vectors, self.when, self.at)

    def describe(self, model: HookedModel | None = None) -> str:
        """As all interventions; with a model its size beside the model's."""
        lines = super().describe(model)
        size = "" if model is None else f"\n{said_of_size(model, self.vectors.numel())}"
        return lines + size

    def fold(self, model: HookedModel) -> PreTrainedModel:
        """A plain copy of the model with the push in its weights; see `LoFiT.fold`.

        Raises `FoldError` unless the push is at all tokens (`when="both", at="all"`).
        """
        if (self.when, self.at) != ("both", "all"):
            raise FoldError(
                f"fold: when={self.when!r}, at={self.at!r}; weights act at all tokens, "
                "when='both', at='all'."
            )
        check_fits(model, self.heads, self.vectors)
        return fold_offsets(model, by_layer(model, self.heads, self.vectors))


def directions_of(
    z: Float[Tensor, "prompt head d_head"],
    labels: Int[Tensor, " prompt"],
    direction: Direction,
    seed: int,
    heads: Sequence[Head],
) -> Float[Tensor, "head d_head"]:
    """Unit vectors from label 0 to label 1. Raises `InterventionError` where there is no way."""
    if direction == "mass_mean":
        found = z[labels == 1].mean(0) - z[labels == 0].mean(0)
    elif direction == "probe":
        found = logistic(z.transpose(0, 1), labels == 1, 1.0)[0].float()
    else:
        found = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(seed))
    norms = found.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        head = heads[int((norms == 0).int().argmax())]
        raise InterventionError(f"labels: {head} says the same on both kinds; leave it out.")
    return found / norms


def of_heads(
    z: Float[Tensor, "prompt layer head d_head"], heads: Sequence[Head], layers: list[int]
) -> Float[Tensor, "prompt some d_head"]:
    """The outputs of some heads, in their order."""
    rows = [layers.index(head.layer) for head in heads]
    return z[:, rows, [head.head for head in heads]]
