"""One vector added to the output of each of some heads: the edit of LoFiT and of ITI.

With z_t[h] the output of head h at token t (its mix of values, before W_O) and v[h] its vector,

    z_t[h] <- z_t[h] + v[h]         for chosen heads h and tokens t

Attention is not touched. Since v does not depend on the input, the edit is the same as adding
sum_h W_O[h] v[h] to what the layer's attention says; at all tokens it is a bias of W_O, which
`fold` writes into the weights.

Which tokens: `when` says those of the prompt, generated ones, or both; with `at="end"` of the
prompt's only the last one is meant, which the first generated token is read from.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import isfinite
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.heads import Head, HeadScores, heads_of
from interp.intervention.base import Hook, InterventionError
from interp.intervention.chosen import check_when, said_when
from interp.model.call import Call, When
from interp.model.hooked import HookedModel

At = Literal["end", "all"]

Vectors = Float[Tensor, "head d_head"]


def offset_hooks(
    model: HookedModel, heads: Sequence[Head], vectors: Vectors, when: When, at: At
) -> Iterator[Hook]:
    """One hook per layer touched: `vectors[i]` is added to z of `heads[i]`, which are sorted.

    Raises `HeadError` where the model lacks a head, `InterventionError` where its heads are of
    another width.
    """
    check_fits(model, heads, vectors)
    tokens = Tokens(model, when, at)
    for layer, whole in by_layer(model, heads, vectors).items():
        yield f"blocks.{layer}.attn.hook_z", shifted_by(whole, tokens)


def shifted_by(whole: Vectors, tokens: "Tokens") -> Callable:
    """A hook that adds `whole`, a row for every head of the layer, at `tokens`."""
    held = whole  # in the type and on the device of z

    def shift(
        z: Float[Tensor, "batch pos head d_head"], hook
    ) -> Float[Tensor, "batch pos head d_head"] | None:
        nonlocal held
        chosen = tokens.now()
        if chosen is False:
            return None
        if held.dtype != z.dtype or held.device != z.device:
            held = whole.to(z)
        if chosen is True:
            return z + held
        return torch.where(chosen[:, :, None, None].to(z.device), z + held, z)

    return shift


class Tokens:
    """Which tokens of the running pass are edited; found out once a pass, not in every layer."""

    def __init__(self, model: HookedModel, when: When, at: At):
        self.model, self.when, self.at = model, when, at
        self._call: Call | None = None
        self._chosen: Bool[Tensor, "batch token"] | bool = True

    def now(self) -> Bool[Tensor, "batch token"] | bool:
        """True: every one. False: none."""
        if self.when == "both" and self.at == "all":
            return True
        if self._call is not self.model.call:
            self._call = self.model.call
            self._chosen = self._find(self._call)
        return self._chosen

    def _find(self, call: Call) -> Bool[Tensor, "batch token"] | bool:
        rows = call.rows(self.when)
        if self.at == "end":
            rows = rows & (call.positions >= call.prompt_lengths[:, None] - 1)
        if not rows.any():
            return False
        return True if rows.all() else rows


def by_layer(
    model: HookedModel, heads: Sequence[Head], vectors: Vectors
) -> dict[int, Float[Tensor, "all_heads d_head"]]:
    """For each layer touched a vector for every head, zero for those that are not chosen."""
    return {
        layer: for_all_heads(model, chosen, vectors[rows])
        for layer, (rows, chosen) in rows_by_layer(heads).items()
    }


def rows_by_layer(heads: Sequence[Head]) -> dict[int, tuple[list[int], list[int]]]:
    """For each layer, which of `heads` (sorted) it has, and their numbers there."""
    found = {}
    for layer, own in groupby(enumerate(heads), key=lambda item: item[1].layer):
        rows, chosen = zip(*own)
        found[layer] = list(rows), [head.head for head in chosen]
    return found


def for_all_heads(
    model: HookedModel, chosen: list[int], vectors: Vectors
) -> Float[Tensor, "all_heads d_head"]:
    """`vectors` in the rows of the heads chosen of a layer, zero in the others."""
    index = torch.tensor(chosen, device=vectors.device)
    return vectors.new_zeros(model.cfg.n_heads, vectors.shape[1]).index_copy(0, index, vectors)


def in_order(heads, vectors: dict[str, Tensor]) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
    """Heads sorted, and what belongs to each in the same order.

    Raises `InterventionError` where a tensor is not [head d_head] (or [head]) or not finite.
    """
    heads = heads_of(heads)
    for name, value in vectors.items():
        if not value.dim() or len(value) != len(heads):
            raise InterventionError(
                f"{name}: {list(value.shape)} for {len(heads)} heads; a row for each is needed."
            )
        if not torch.isfinite(value).all():
            raise InterventionError(f"{name}: holds NaN or infinite numbers.")
    order = sorted(range(len(heads)), key=heads.__getitem__)
    sorted_heads = tuple(heads[i] for i in order)
    return sorted_heads, {name: v.detach()[order] for name, v in vectors.items()}


def check_width(name: str, vectors: Tensor) -> None:
    """Raises `InterventionError` where these are no rows of numbers."""
    if vectors.dim() != 2 or not vectors.shape[1]:
        raise InterventionError(f"{name}: {list(vectors.shape)}, and should be [head, d_head].")


def check_settings(when: str, at: str, strength: float) -> None:
    """Raises `InterventionError` for a word or number that has no meaning here."""
    check_when(when)
    if at not in get_args(At):
        raise InterventionError(f"at={at!r}: one of {', '.join(get_args(At))}.")
    if not isfinite(strength):
        raise InterventionError(f"strength={strength}: a finite number; 0 does nothing.")


def check_fits(model: HookedModel, heads: Sequence[Head], vectors: Vectors) -> None:
    """Raises `HeadError` or `InterventionError` where heads or their width are not the model's."""
    model.check_heads(heads)
    if len(heads) and vectors.shape[1] != model.cfg.d_head:
        raise InterventionError(
            f"vectors: for heads of width {vectors.shape[1]}, and {model.name} has "
            f"{model.cfg.d_head}. Fit them on this model."
        )


def top_heads(scores: HeadScores, k: int | float) -> list[Head]:
    """The best `k` heads; a float is a share of all heads, 0.1 a tenth."""
    return scores.top(fraction=k) if isinstance(k, float) else scores.top(k)


def said_of_tokens(when: When, at: At) -> str:
    """Which tokens are edited, in words."""
    if at == "all":
        return said_when(when)
    last = {"prompt": "at the prompt's last token", "generated": "at generated tokens"}
    return last.get(when, "at the prompt's last token and generated ones")


def said_of_size(model: HookedModel, n: int) -> str:
    """A number of parameters beside the model's own."""
    total = sum(p.numel() for p in model.original_model.parameters())
    return f"parameters: {n}, {n / total:.2g} of the model's {total}"
