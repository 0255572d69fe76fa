"""Ablate heads: take away what they say of this input, and leave the rest of the model as it is.

With z_i the head's output at token i (its mix of values, before W_O), four ways of taking it away:

- `zero`: z_i = 0.
- `mean`: z_i = the mean of z over the real tokens of given prompts (or of the batch at hand).
- `resample`: z_i = z of another token of given prompts (or of the previous prompt of the batch:
  the same column, or its nearest real token where that column is padding).
- `uniform`: the head looks at all visible keys alike, z_i = mean of the values it may see; this is
  what masking a head means in the retrieval-head code (Wu et al. 2024, arXiv 2404.15574).

Zero takes the head away from the distribution that later layers know; mean and resample keep it
there (Chan et al. 2022, causal scrubbing; Zhang & Nanda 2024, arXiv 2309.16042).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads import Head, HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.model.attention import Attention
from interp.model.call import When
from interp.model.hooked import HookedModel
from interp.model.towers import sees_only

How = Literal["zero", "mean", "resample", "uniform"]


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Ablate `heads`; `how` as in the module's docstring, `when` says at which tokens.

    `bank[i]` belongs to `heads[i]`, as given; both are then kept in the order of the heads. No
    heads at all is allowed and does nothing, so that a sweep may start at 0.

    `mean` and `resample` without `bank` take their z from the batch that is running: then the
    result depends on the batch, and on a cached step from that step's tokens only. `Ablate.fit`
    fills `bank` from prompts: then a batch equals one by one, with and without the KV cache.
    """

    heads: HeadsLike
    how: How = "zero"
    when: When = "both"
    bank: Float[Tensor, "head sample d_head"] | None = None
    seed: int = 0

    def __post_init__(self):
        heads = heads_of(self.heads)
        object.__setattr__(self, "heads", tuple(sorted(heads)))
        for name, allowed in (("how", get_args(How)), ("when", get_args(When))):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise InterventionError(f"{name}={value!r}: one of {', '.join(allowed)}.")
        if self.bank is not None:
            self._check_numbers(self.bank)
            if heads != self.heads:
                order = sorted(range(len(heads)), key=heads.__getitem__)
                object.__setattr__(self, "bank", self.bank[order])

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.heads[:4])) + (", ..." if len(self.heads) > 4 else "")
        source = ""
        if self.how in ("mean", "resample"):
            source = " over given prompts" if self.bank is not None else " over the batch"
        when = {"both": "all", "prompt": "the prompt's", "generated": "generated"}[self.when]
        heads = f"{len(self.heads)} heads: {shown}" if self.heads else "no heads"
        return f"Ablate({heads}; {self.how}{source}; at {when} tokens)"

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        heads,
        how: How = "mean",
        when: When = "both",
        *,
        samples: int = 256,
        seed: int = 0,
        batch_size: int = 8,
    ) -> "Ablate":
        """Take the z of `mean` or `resample` from `prompts` (anything that `as_prompts` reads).

        `samples`: how many tokens' z are kept for `resample`.
        """
        from interp.tasks.prompts import as_prompts

        if how not in ("mean", "resample"):
            raise InterventionError(f"how={how!r}: only mean and resample are fitted.")
        heads = tuple(sorted(heads_of(heads)))
        if not heads:
            return cls(heads, how, when, seed=seed)
        model.check_heads(heads)
        if sees_only(model) or any(head.tower == "vision" for head in heads):
            raise InterventionError(
                "heads: those of an image encoder are ablated to zero, evenly, or over the batch; "
                "only a language model's z can be taken from prompts."
            )
        z = _collect_z(model, list(as_prompts(model, prompts)["input_ids"]), heads, batch_size)
        if how == "mean":
            bank = z.mean(1, keepdim=True)
        else:
            generator = torch.Generator().manual_seed(seed)
            bank = z[:, torch.randperm(z.shape[1], generator=generator)[:samples]]
        return cls(heads, how, when, bank, seed)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched. Raises `HeadError` where the model lacks a head."""
        model.check_heads(self.heads, tower=None)
        self._check_bank(model)
        place = attrgetter("tower", "layer")
        for (tower, _), heads in groupby(sorted(self.heads, key=place), key=place):
            heads = list(heads)
            index = [head.head for head in heads]
            tokens = partial(self._tokens, model, tower == "vision" or sees_only(model))
            if self.how == "uniform":
                look = partial(self._look_evenly, tokens, index)
                yield model.hook_of(heads[0], "hook_attention"), look
                continue
            rows = [self.heads.index(head) for head in heads]
            bank = None if self.bank is None else self.bank[rows]
            replace = partial(self._replace_z, tokens, index, bank)
            yield model.hook_of(heads[0], "hook_z"), replace

    def _check_numbers(self, bank: Tensor) -> None:
        if self.how not in ("mean", "resample"):
            raise InterventionError(f"bank: how={self.how!r} takes none; mean and resample do.")
        if bank.dim() != 3 or len(bank) != len(self.heads) or not bank.shape[1]:
            shape, need = list(bank.shape), len(self.heads)
            raise InterventionError(f"bank: {shape}, and should be [{need} heads, samples, width].")
        if not torch.isfinite(bank).all():
            raise InterventionError("bank: holds NaN or infinite numbers.")

    def _check_bank(self, model: HookedModel) -> None:
        if self.bank is not None and self.bank.shape[2] != model.cfg.d_head:
            raise InterventionError(
                f"bank: made for heads of width {self.bank.shape[2]}, and {model.name} has "
                f"{model.cfg.d_head}. Fit it on this model."
            )

    def _tokens(
        self, model: HookedModel, of_image: bool, shape: torch.Size, device: torch.device
    ) -> "_Tokens":
        """Which tokens of the running pass to act on; those of an image are all its prompt's."""
        if not of_image:
            call = model.call
            return _Tokens(call.rows(self.when), call.positions, call.real)
        real = torch.ones(shape, dtype=torch.bool, device=device)
        positions = torch.arange(shape[1], device=device).expand(shape)
        return _Tokens(real & (self.when != "generated"), positions, real)

    def _look_evenly(
        self, tokens: Callable, heads: list[int], attention: Attention, hook
    ) -> Attention:
        rows = tokens(attention.positions.shape, attention.positions.device).rows
        return attention.set_rows(heads=heads, rows=rows) if rows.any() else attention

    def _replace_z(
        self,
        tokens: Callable,
        heads: list[int],
        bank: Float[Tensor, "some sample d_head"] | None,
        z: Float[Tensor, "batch pos head d_head"],
        hook,
    ) -> Float[Tensor, "batch pos head d_head"]:
        found = tokens(z.shape[:2], z.device)
        rows = found.rows[:, :, None, None]
        if not rows.any():
            return z
        new = self._new_z(z[:, :, heads], bank, found.positions, found.real)
        index = torch.tensor(heads, device=z.device)
        return z.index_copy(2, index, torch.where(rows, new.to(z), z[:, :, heads]))

    def _new_z(
        self,
        z: Float[Tensor, "batch pos some d_head"],
        bank: Float[Tensor, "some sample d_head"] | None,
        positions: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "#batch #pos some d_head"]:
        if self.how == "zero":
            return torch.zeros_like(z)
        if bank is not None:
            # which sample depends on the position alone: the same in any batch, cached or not
            sample = (positions * 7919 + self.seed * 104729) % bank.shape[1]
            return bank.to(z.device)[:, sample.to(z.device)].permute(1, 2, 0, 3)
        if self.how == "mean":
            # float32: a sum over many tokens loses its last ones in bf16
            return z[real].float().mean(0)[None, None]
        if len(z) == 1:
            raise InterventionError(
                "how='resample': over the batch needs 2 or more prompts; use Ablate.fit(...)."
            )
        donor, real = z.roll(1, dims=0), real.roll(1, dims=0).int()
        column = torch.arange(z.shape[1], device=z.device).expand(real.shape)
        first, last = real.argmax(1), z.shape[1] - 1 - real.flip(1).argmax(1)
        column = column.clamp(first[:, None], last[:, None])
        return donor.gather(1, column[:, :, None, None].expand_as(donor))


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Of a pass: the tokens to act on, where each stands, and which are no padding."""

    rows: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]


def _collect_z(
    model: HookedModel, token_lists: list[list[int]], heads: tuple[Head, ...], batch_size: int
) -> Float[Tensor, "head token d_head"]:
    """z of the given heads at every real token of the prompts, on the CPU."""
    parts: list[list[Tensor]] = [[] for _ in heads]

    def keep(z: Tensor, hook, layer: int) -> None:
        for row, head in enumerate(heads):
            if head.layer == layer:
                parts[row].append(z[:, :, head.head][model.call.real].float().cpu())

    layers = sorted({head.layer for head in heads})
    hooks = [(f"blocks.{layer}.attn.hook_z", partial(keep, layer=layer)) for layer in layers]
    with model.hooks(fwd_hooks=hooks):
        for batch in model.batches(token_lists, batch_size, desc="mean z"):
            model.run(batch.input_ids, batch.attention_mask)
    return torch.stack([torch.cat(part) for part in parts])
