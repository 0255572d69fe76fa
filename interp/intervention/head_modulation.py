"""Head modulation: let the row that predicts the next token look more at chosen parts of the image.

With s_j the scaled logits of that row in one head, and c_j >= 0 the strength of key j,

    s'_j = s_j + c_j |s_j|,    then softmax over all keys as ever

in the prompt's last row and in each row after it. c is `local` on tokens that show a detail (Lc),
`summary` on those that hold a summary of the image (Sm), and 0 elsewhere; which these are, the
image encoder's CLS token tells, with c^l_j what its heads give to patch j in layer l:

    Sm = {j : c^f_j > Q3 + 1.5 (Q3 - Q1)}                (f: the layer that the features are from)
    Lc = the floor(local_share N) patches with the largest c^0, without Sm

each image (each tile of one that is cut) by itself. With p_j the weights before, the row's new
output is a mix of its old one and of few values, which is what tests compare with:

    w_j = p_j expm1(c_j |s_j|),  W = sum of w_j,  p'_j = (p_j + w_j) / (1 + W),
    z' = (z + sum of w_j v_j) / (1 + W)

So the mass of Lc and Sm together never falls, and other keys keep their proportions.

Source: Arif et al. 2025, "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large
Vision-Language Model" (arXiv 2501.12206; later versions are called PAINT), and its code, whose
numbers are the defaults; the code leaves out the language model's first two layers. With all of an
image's tokens at one strength it is PAI (Liu et al. 2024, "Paying More Attention to Image", arXiv
2407.21771; its text-only guidance in decoding is not in it): `HeadModulation.pai(0.5)`. Ours are:

- `spatial_share`: more of Lc by what a patch receives from others in the encoder's first layer (the
  code sums over the wrong axis, so that its choice is arbitrary);
- `gains`, a factor for each head of the language model (the abstract speaks of head-specific
  modulation, the code has none): see `HeadModulation.fit`. c times gain is kept below 1;
- encoders without a CLS token: `tokens="received"` takes what patches receive instead.

The edit reads logits, so it is not the same for a model that adds a constant to a row's; where a
model caps its logits softly, it comes after the cap. At c >= 1 it would turn the most disliked keys
into the most liked ones. Before calling a caption less hallucinated, compare it with one that is
cut to the same recall.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import check_when
from interp.intervention.image_strengths import ImageStrengths
from interp.model.attention import Attention
from interp.model.call import When
from interp.model.class_rows import tower_of
from interp.model.edits import Bias, Block
from interp.model.hooked import HookedModel
from interp.model.images import ImageError, images_of, of_images
from interp.tasks.prompts import as_prompts

Tokens = Literal["class", "received", "random", "all"]
Layers = slice | Sequence[int | None]

MOST = 0.99  # c times a gain
SAID = {
    "class": "chosen by the CLS token",
    "received": "chosen by what patches receive",
    "random": "chosen at random",
}


@dataclass(frozen=True, eq=False, repr=False)
class HeadModulation(Intervention):
    """Raise the logits of chosen image tokens, as in the module's docstring.

    Args:
        local: c on Lc, from 0 to below 1.
        summary: c on Sm.
        local_share: How many of an image's patches are local: that share of them.
        spatial_share: The share that is added to them by what they receive in the first layer.
        layers: Of the language model, as a slice or (start, stop).
        tokens: "class"; "received", for encoders without a CLS token; "random", as many random
            patches (a control; the same places in each image); "all", every one at `local` (PAI).
        gains: A factor on c for each head, `[layer, head]` of the whole language model.
        when: Whose next token: the prompt's last token, generated ones, or both.
        seed: Of the random patches.

    Prompts without an image are left as they are; where none of a run has one, that is an error at
    the end. A prompt that is told to end before its last token (an answer that is only read) gets
    the edit from there on, as if the answer had been written; where nobody told, the last token of
    each pass is edited, and then a generation without the KV cache differs from one with it.
    """

    local: float = 0.7
    summary: float = 0.3
    local_share: float = 0.25
    spatial_share: float = 0.0
    layers: Layers = (2, None)
    tokens: Tokens = "class"
    gains: Float[Tensor, "layer head"] | None = None
    when: When = "both"
    seed: int = 0

    def __post_init__(self):
        given = self.layers
        ends = (given.start, given.stop) if isinstance(given, slice) else tuple(given)
        if len(ends) != 2 or (isinstance(given, slice) and given.step not in (None, 1)):
            raise InterventionError(
                f"layers={given}: a slice such as slice(2, None), in steps of 1."
            )
        object.__setattr__(self, "layers", ends)
        check_when(self.when)
        if self.tokens not in get_args(Tokens):
            allowed = ", ".join(get_args(Tokens))
            raise InterventionError(f"tokens={self.tokens!r}: one of {allowed}.")
        for name in ("local", "summary"):
            if not 0 <= getattr(self, name) < 1:
                raise InterventionError(
                    f"{name}={getattr(self, name)}: from 0 to below 1, where the order of keys "
                    "within a group would turn round."
                )
        for name in ("local_share", "spatial_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InterventionError(f"{name}={getattr(self, name)}: a share, from 0 to 1.")
        if self.gains is not None:
            if self.gains.dim() != 2:
                shape = list(self.gains.shape)
                raise InterventionError(f"gains: {shape}, and should be [layers, heads].")
            if not torch.isfinite(self.gains).all() or bool((self.gains < 0).any()):
                raise InterventionError("gains: finite numbers from 0 on.")

    def __repr__(self) -> str:
        start, stop = self._ends
        layers = f"layers {start or 0}-{'end' if stop is None else stop - 1}"
        if self.tokens == "all":
            what = f"all image tokens by {self.local:g}"
        else:
            share = f"{self.local_share:.0%} of the patches"
            share += f" and {self.spatial_share:.0%} by what they receive" * (
                self.spatial_share > 0
            )
            what = f"{share} by {self.local:g}, outliers by {self.summary:g}, {SAID[self.tokens]}"
        gains = "" if self.gains is None else "; by head"
        rows = {
            "prompt": "the prompt's last token",
            "generated": "generated tokens",
            "both": "the prompt's last token and generated ones",
        }
        return f"HeadModulation({what}; {layers}{gains}; at {rows[self.when]})"

    @classmethod
    def pai(cls, strength: float = 0.5, layers: Layers = (2, None), **options) -> "HeadModulation":
        """All of an image's tokens at one strength (PAI)."""
        return cls(local=strength, layers=layers, tokens="all", **options)

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        *,
        most: float = 2.0,
        batch_size: int = 8,
        progress: bool = True,
        **options,
    ) -> "HeadModulation":
        """With `gains` from how much each head looks at the image on `prompts`.

        A head's gain is the weight that it gives to the image's tokens in the rows that the edit is
        for (the prompt's last one, and those of its answer), divided by the mean over its layer's
        heads, but at most `most`; mean over prompts. `options` are those of `HeadModulation`.

        Raises `ImageError` where a prompt has no image.
        """
        tower_of(model)
        if most <= 0:
            raise InterventionError(f"most={most}: above 0.")
        mass = _mass_on_image(model, as_prompts(model, prompts), batch_size, progress)
        share = mass / mass.mean(-1, keepdim=True).clamp_min(1e-9)
        known = share.clamp_max(most).mean(0)
        gains = torch.ones(len(model.blocks), model.cfg.n_heads)
        gains[model.attention_layers] = known
        return cls(gains=gains, **options)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """In the encoder, where the prompt goes in, and one for each layer that is edited.

        Raises `ImageError` for a text-only model, or an encoder without the CLS token that is asked
        for; `InterventionError` where the model has none of `layers`, or other heads than `gains`.
        """
        tower_of(model)
        layers = self._layers_of(model)
        if not self.local and not self.summary:
            return
        strengths = ImageStrengths(self, model)
        yield from strengths.hooks()
        for layer in layers:
            edit = partial(self._strengthen, model, strengths, self._gains(layer))
            yield f"blocks.{layer}.attn.hook_attention", edit

    @property
    def _ends(self) -> tuple[int | None, int | None]:
        assert not isinstance(self.layers, slice)  # as it was given
        start, stop = self.layers
        return start, stop

    def _layers_of(self, model: HookedModel) -> list[int]:
        chosen = range(len(model.blocks))[slice(*self._ends)]
        found = [layer for layer in model.attention_layers if layer in chosen]
        if not found:
            raise InterventionError(
                f"layers={self.layers}: none of {model.name}'s {len(model.blocks)}; for a small "
                "model, slice(0, None)."
            )
        shape = (len(model.blocks), model.cfg.n_heads)
        if self.gains is not None and tuple(self.gains.shape) != shape:
            raise InterventionError(
                f"gains: {list(self.gains.shape)}, and {model.name} has {list(shape)} layers and "
                "heads. Fit it on this model."
            )
        return found

    def _gains(self, layer: int) -> Float[Tensor, "1 head 1 1"] | None:
        return None if self.gains is None else self.gains[layer][None, :, None, None]

    def _strengthen(
        self,
        model: HookedModel,
        strengths: ImageStrengths,
        gains: Float[Tensor, "1 head 1 1"] | None,
        attention: Attention,
        hook,
    ) -> Attention | None:
        call = model.call
        rows = call.rows(self.when) & (call.positions >= call.prompt_lengths[:, None] - 1)
        rows = rows.to(attention.q.device)
        if not bool(rows.any()):
            return None
        at_keys = strengths.at(attention)
        rows = rows & (at_keys > 0).any(1, keepdim=True)
        if not bool(rows.any()):
            return None
        by_head = at_keys[:, None, None]
        if gains is not None:
            by_head = (by_head * gains.to(by_head)).clamp_max(MOST)
        return strengthened(attention, by_head, rows)


def strengthened(
    attention: Attention,
    strength: Float[Tensor, "#batch #head 1 key"],
    rows: Bool[Tensor, "batch query"],
) -> Attention:
    """`attention` with c |s| more on its logits s in `rows`; c is `strength`."""
    heads = (strength != 0).any(-1).any(0).view(1, -1, 1, 1).expand(1, attention.n_heads, 1, 1)
    every = {"queries": attention.n_queries, "keys": attention.n_keys}
    flags = {name: heads.new_ones(size) for name, size in every.items()}
    edit = Strengthen(
        strength,
        heads,
        flags["queries"][None, None, :, None],
        flags["keys"][None, None, None, :],
        rows[:, None, :, None],
    )
    edited = attention._edited(edit)
    if attention.edits or type(attention) is not Attention:
        return edited
    facts = {field.name: getattr(edited, field.name) for field in fields(Attention)}
    return Strengthened(**facts, base=attention, rows=rows)


@dataclass(frozen=True, eq=False)
class Strengthen(Bias):
    """logits + delta |logits| in the rows of each prompt."""

    rows: Bool[Tensor, "batch 1 queries 1"]

    def apply(self, logits: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        """A key that is hidden, by -inf or the lowest number, stays so."""
        assert isinstance(self.delta, Tensor)
        seen = logits > torch.finfo(logits.dtype).min / 2
        chosen = block.of(self.rows) & block.of(self.heads) & seen
        return torch.where(chosen, logits + block.of(self.delta) * logits.abs(), logits)


@dataclass(frozen=True, eq=False, kw_only=True)
class Strengthened(Attention):
    """What `strengthened` gives: only the edited rows leave the fast kernel.

    With one more edit, or anything else changed, it is an `Attention` like any other.
    """

    base: Attention
    rows: Bool[Tensor, "batch query"]

    def output(self) -> Float[Tensor, "batch head query d_value"]:
        """z, as `Attention.output`."""
        same = (field.name for field in fields(Attention) if field.name != "edits")
        changed = any(getattr(self, name) is not getattr(self.base, name) for name in same)
        columns = self.rows.any(0).nonzero().squeeze(1)
        if len(self.edits) != 1 or changed or len(columns) == self.n_queries:
            return super().output()
        heads = self.edits[0].heads.flatten().nonzero().squeeze(1)
        values = self.per_query_head(self.v, heads).float()
        edited = (self.pattern(heads, columns) @ values).to(self.v.dtype)
        unedited = self.base.output()
        place = heads[:, None], columns[None, :]
        mixed = torch.where(
            self.rows[:, None, columns, None], edited, unedited[:, place[0], place[1]]
        )
        z = unedited.clone()
        z[:, place[0], place[1]] = mixed
        return z


def _mass_on_image(model: HookedModel, prompts, batch_size: int, progress: bool) -> Tensor:
    """What each head gives to the image in the rows that predict: `[prompt layer head]`."""
    images = images_of(prompts)
    answers = prompts["answer_ids"] if "answer_ids" in prompts.column_names else None
    lists = [list(ids) for ids in prompts["input_ids"]]
    lengths = torch.tensor([len(ids) for ids in lists])
    if answers is not None:
        lists = [ids + list(more or [])[:-1] for ids, more in zip(lists, answers, strict=True)]
    found: dict[int, Tensor] = {}
    desc = "gains" if progress else None
    for batch in model.batches(lists, batch_size, desc, images=images):
        keys = of_images(model, batch.input_ids)
        without = (~keys.any(1)).nonzero().flatten().tolist()
        if without:
            raise ImageError(f"prompt {int(batch.index[without[0]])}: it has no image.")
        real = batch.attention_mask.bool()
        last = lengths[batch.index].to(real.device)[:, None] - 1
        rows = real & (real.cumsum(1) - 1 >= last)

        def look(attention: Attention, keys=keys, rows=rows) -> Float[Tensor, "batch head"]:
            columns = rows.any(0).nonzero().squeeze(1)
            mine = rows[:, None, columns]
            mass = attention.mass_on(keys, queries=columns)
            return (mass * mine).sum(-1) / mine.sum(-1)

        mass = model.read_attention(
            batch.input_ids, look, attention_mask=batch.attention_mask, **batch.inputs
        )
        found |= dict(zip(batch.index.tolist(), mass.cpu(), strict=True))
    return torch.stack([found[row] for row in range(len(lists))])
