"""VHR: heads that say something else because of the image are made to say more of it.

At the last token of a prompt with an image each head of a reinforced layer is compared with what it
says there without the image, layer by layer in forward order, so that a layer is compared after
those below it were reinforced. The upper half of its heads, outliers apart, is reinforced at the
prompt's tokens and at all that follow (`interp.analysis.divergence` has the formulas):

    z_h <- alpha * z_h     for the chosen heads h of each reinforced layer

which adds (alpha - 1) * sum over them of z_h W_O to the residual stream. No attention weight is
read or changed; the output projection's bias is not scaled.

Source: He et al. 2024, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
Divergence" (arXiv 2412.13949, algorithm 1; alpha = 2, of 32 layers the second and the last 14).
What it does not say, and is settled here: images are deleted from the text, which is numbered anew;
the image-free pass is the model without any edit (`reference="plain"`) or with the same heads
reinforced in the layers below (`"lockstep"`); the layers of models of other depths.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Literal, get_args
from zlib import crc32

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analysis.divergence import divergence, lower_half, outliers, upper_half
from interp.heads import HeadsLike
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import by_layer, check_when, chosen, said, said_when
from interp.intervention.following import Rows, check_goes_on
from interp.intervention.offsets import Tokens
from interp.model.aside import aside
from interp.model.attention import Attention
from interp.model.call import Call, When
from interp.model.graph import output_weights
from interp.model.hooked import HookedModel
from interp.model.image_free import without_images
from interp.model.images import image_token, images_of

Reference = Literal["plain", "lockstep"]
Which = Literal["upper", "lower", "random", "all", "others"]
LAST = 14 / 32  # of the layers, beside the second one


@dataclass(frozen=True, eq=False, repr=False)
class VHR(Intervention):
    """Scale z by `alpha` in the heads that the image changes most, chosen for each prompt.

    `layers`: default the second one and the last 44 %, as in the paper. `heads`: these, for every
    prompt, instead of a choice (it then works on text-only models, too). `outlier_test=False` may
    choose heads that say more without the image.

    `which`: "upper", the paper's; the others are controls: the "lower" half; half of the heads at
    "random" (drawn by `seed` for each prompt and layer); "all"; or "others", those that "upper"
    would not choose, scaled so that each token's residual stream is moved as far as by "upper".

    The image-free pass runs within the prompt's own, before its first layer, and no hook of others
    acts in it; `"lockstep"` takes one for each layer. Nothing is chosen, and nothing done, for a
    prompt without an image. What was chosen is kept for all tokens that follow and follows beams.
    A teacher-forced answer has to be told apart from the prompt (`interp.evaluate` does, or `with
    model.spans(None, lengths)`): else its last token is taken for the prompt's.

    Not causal over the prompt, since the choice is made at its last token. Given `heads`, it is.

    Raises `ImageError` for a text-only model (but with `heads`) and for a prompt that ends in its
    image; while it runs `InterventionError` on prompts given in chunks or as embeddings.
    """

    alpha: float = 2.0
    layers: Sequence[int] | None = None
    heads: HeadsLike | None = None
    reference: Reference = "plain"
    outlier_test: bool = True
    which: Which = "upper"
    when: When = "both"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "heads", chosen(self.heads))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        check_when(self.when)
        if not isfinite(self.alpha):
            raise InterventionError(f"alpha={self.alpha}: a number (1 changes nothing).")
        for name, values in (("reference", get_args(Reference)), ("which", get_args(Which))):
            if getattr(self, name) not in values:
                value = getattr(self, name)
                raise InterventionError(f"{name}={value!r}: one of {', '.join(values)}.")
        if self.heads is not None and (self.layers is not None or self.which != "upper"):
            raise InterventionError("heads: given heads are all there is; no layers, no `which`.")
        if self.which == "others" and self.reference == "lockstep":
            raise InterventionError("which='others': with reference='plain' only.")

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Given heads do not depend on what comes later in the prompt."""
        return self.heads is not None

    def __repr__(self) -> str:
        return f"VHR({self._said_heads()} say {self.alpha:g} times as much; {said_when(self.when)})"

    def _said_heads(self) -> str:
        if self.heads is not None:
            return said(self.heads)
        half = {
            "upper": "the half that the image changes most",
            "lower": "the half that the image changes least",
            "random": f"a random half (seed {self.seed})",
            "all": "all heads",
            "others": "the half that the image changes least, as far in all,",
        }[self.which]
        layers = "default layers" if self.layers is None else f"layers {list(self.layers)}"
        how = "" if self.reference == "plain" else ", compared in lockstep"
        how += "" if self.outlier_test else ", outliers too"
        return f"{layers}: {half}{how}"

    def layers_of(self, model: HookedModel) -> list[int]:
        """The reinforced layers. Raises `HeadError` where the model lacks one."""
        if self.layers is None:
            return default_layers(model.attention_layers)
        model.check_layers(self.layers)
        return list(self.layers)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """Hooks on z; to choose heads also one on the embedding, and one that follows beams."""
        if self.heads is not None:
            tokens = Tokens(model, self.when, "all")
            for layer, heads in by_layer(model, self.heads).items():
                flags = torch.zeros(1, model.cfg.n_heads, dtype=torch.bool)
                flags[:, heads] = True
                if self.alpha != 1:
                    yield f"blocks.{layer}.attn.hook_z", partial(self._scale_given, tokens, flags)
            return
        image_token(model)
        layers = self.layers_of(model)
        if layers and self.alpha != 1:
            yield from Reinforced(self, model, layers).hooks()

    def _scale_given(
        self,
        tokens: Tokens,
        heads: Bool[Tensor, "1 head"],
        z: Float[Tensor, "batch pos head d_head"],
        hook,
    ) -> Tensor | None:
        rows = tokens.now()
        return None if rows is False else scaled(z, rows, heads, self.alpha)

    def choices(self, model: HookedModel, prompts, *, batch_size: int = 8) -> pd.DataFrame:
        """What is chosen on some prompts: `prompt, layer, head, distance, outlier, chosen`.

        `VHR(heads=...)` of one prompt's is the paper's control of a head set that stays the same.
        """
        from interp.tasks.prompts import as_prompts, spans_of

        if self.heads is not None:
            raise InterventionError("choices: heads are given, and nothing is chosen.")
        image_token(model)
        prompts = as_prompts(model, prompts)
        spans, parts = spans_of(prompts), []
        layers = self.layers_of(model)
        for batch in model.batches(prompts["input_ids"], batch_size, images=images_of(prompts)):
            reinforced, index = Reinforced(self, model, layers), batch.index.tolist()
            told = None if spans is None else [spans[i] for i in index]
            with model.spans(told), model.hooks(fwd_hooks=reinforced.hooks()):
                model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
            for layer in layers:
                table = reinforced.table(layer)
                parts.append(table.assign(layer=layer, prompt=[index[row] for row in table["row"]]))
        columns = ["prompt", "layer", "head", "distance", "outlier", "chosen"]
        return pd.concat(parts)[columns].sort_values(columns[:3], ignore_index=True)


def default_layers(layers: Sequence[int]) -> list[int]:
    """The second one and the last 14 of 32, in proportion."""
    last = max(1, round(LAST * len(layers)))
    return sorted({*layers[1:2], *layers[-last:]})


def scaled(
    z: Float[Tensor, "batch pos head d_head"],
    rows: Bool[Tensor, "batch pos"] | Literal[True],
    heads: Bool[Tensor, "#batch head"],
    factor: float | Float[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos head d_head"]:
    """z times `factor` at some tokens (True: all), in some heads."""
    if torch.is_tensor(factor):
        factor = factor[:, :, None, None].to(z.dtype)
    where = heads.to(z.device)[:, None, :, None]
    if rows is not True:
        where = where & rows.to(z.device)[:, :, None, None]
    # the product itself, not a factor of 1: elsewhere z has to be what it was
    return torch.where(where, z * factor, z)


class Reinforced:
    """The heads chosen for the prompts that were read last, in one block: its hooks share this."""

    def __init__(self, edit: VHR, model: HookedModel, layers: Sequence[int]):
        self.edit, self.model, self.layers = edit, model, list(layers)
        self.heads: dict[int, Bool[Tensor, "batch head"]] = {}
        self._compared: dict[int, tuple[Tensor, Tensor]] = {}
        self._call: Call | None = None
        self._fresh = False
        self._tokens = Tokens(model, edit.when, "all")
        self._rows = Rows()
        self._texts: list[list[int]] = []
        self._seeds: list[int] = []
        self._with_image = torch.zeros(0, dtype=torch.bool)
        self._last = torch.zeros(0, dtype=torch.long)
        self._plain: dict[int, Tensor] = {}

    def hooks(self) -> list[Hook]:
        """In the order in which they fire."""
        found: list[Hook] = [("hook_embed", self.begin)]
        if self.model.lazy:  # else nobody may look at the cache
            found.append((f"blocks.{self.layers[0]}.attn.hook_attention", self.follow))
        return found + [
            (f"blocks.{layer}.attn.hook_z", partial(self.scale, layer)) for layer in self.layers
        ]

    # the facts of a pass

    def begin(self, embedded: Tensor, hook) -> None:
        """The prompts of a pass, read without their images before the pass goes on."""
        call = self.model.call
        if call is self._call:
            return
        self._call, self._fresh = call, call.whole
        if self._fresh:
            self._read_prompts(call, embedded.device)
        elif bool(call.rows("prompt").any()):
            raise InterventionError(
                "VHR: this prompt comes in chunks, and its heads are chosen at its last token; "
                "pass it whole."
            )
        else:
            check_goes_on("VHR", next(iter(self.heads.values()), None), len(embedded))

    def _read_prompts(self, call: Call, device: torch.device) -> None:
        if call.input_ids is None:
            raise InterventionError(
                "VHR: it was given embeddings, and has to know which tokens are an image's; give "
                "input_ids and pixels."
            )
        lengths = call.prompt_lengths
        at = (call.real.cumsum(1) == lengths[:, None]) & call.real
        self._last = at.int().argmax(1).to(device)
        prompts = [
            ids[real][:n].tolist()
            for ids, real, n in zip(call.input_ids, call.real, lengths.tolist(), strict=True)
        ]
        texts = without_images(self.model, prompts)
        token = image_token(self.model)
        self._with_image = torch.tensor([token in ids for ids in prompts], device=device)
        self._texts = [text for text, ids in zip(texts, prompts, strict=True) if token in ids]
        self._seeds = [crc32(str(ids).encode()) for ids in prompts]
        self.heads, self._compared, self._plain = {}, {}, {}
        compares = self.edit.which not in ("all", "random")
        if self._texts and compares and self.edit.reference == "plain":
            self._plain = self._without_images(self.layers)

    def _without_images(self, layers: list[int]) -> dict[int, Float[Tensor, "some head d_head"]]:
        """z at the last token of the prompts that have images, read without these.

        Layers below are reinforced as far as their heads were chosen, in lockstep.
        """
        found: dict[int, Tensor] = {}

        def keep(z: Tensor, hook, layer: int) -> None:
            found[layer] = z[:, -1].detach().clone()

        def edit(z: Tensor, hook, layer: int) -> Tensor:
            return scaled(z, True, self.heads[layer][self._with_image], self.edit.alpha)

        hooks = [(f"blocks.{n}.attn.hook_z", partial(keep, layer=n)) for n in layers]
        if self.edit.reference == "lockstep":
            hooks += [(f"blocks.{n}.attn.hook_z", partial(edit, layer=n)) for n in self.heads]
        with aside(self.model):
            batch = self.model.batch(self._texts)
            with self.model.hooks(fwd_hooks=hooks):
                self.model.run(batch.input_ids, batch.attention_mask)
        return found

    def follow(self, attention: Attention, hook) -> None:
        """Put what was chosen into the order that the rows of the cache were put into."""
        parents = self._rows.go_on(attention, self.model.call)
        if self._fresh:
            return
        if parents is None:
            raise InterventionError(
                "VHR: this pass goes on from a cache whose prompts were not the last ones read in "
                "this block; read them in it again."
            )
        if not torch.equal(parents, torch.arange(len(parents), device=parents.device)):
            self.heads = {layer: heads[parents] for layer, heads in self.heads.items()}

    # choosing and scaling

    def scale(self, layer: int, z: Float[Tensor, "batch pos head d_head"], hook) -> Tensor | None:
        if self._fresh:
            self.heads[layer] = self._choose(layer, z)
        heads, rows = self.heads[layer].to(z.device), self._tokens.now()
        if rows is False:
            return None
        if self.edit.which != "others":
            return scaled(z, rows, heads, self.edit.alpha)
        # `heads` are those that "upper" chooses
        others = ~heads & self._image_rows(heads)
        return scaled(z, rows, others, self._as_far(layer, z, heads, others))

    def _image_rows(self, heads: Tensor) -> Bool[Tensor, "batch 1"]:
        """Rows that have an image: these chose a head."""
        return heads.any(1, keepdim=True)

    def _as_far(
        self,
        layer: int,
        z: Float[Tensor, "batch pos head d_head"],
        heads: Bool[Tensor, "batch head"],
        others: Bool[Tensor, "batch head"],
    ) -> Float[Tensor, "batch pos"]:
        """The factor by which `others` move the residual stream as far as alpha does in `heads`."""
        weight, _ = output_weights(self.model, layer, z.shape[2])
        weight = weight.to(z.device).float()

        def length(some: Tensor) -> Tensor:
            own = z.float() * some[:, None, :, None]
            return torch.einsum("bphd,hde->bpe", own, weight).norm(dim=-1)

        tiny = torch.finfo(torch.float32).tiny
        return 1 + (self.edit.alpha - 1) * length(heads) / length(others).clamp_min(tiny)

    def _choose(self, layer: int, z: Tensor) -> Bool[Tensor, "batch head"]:
        batch, n_heads = len(z), z.shape[2]
        rows = self._with_image.to(z.device)
        chosen = torch.zeros(batch, n_heads, dtype=torch.bool, device=z.device)
        if self.edit.which == "all":
            return chosen | rows[:, None]
        if self.edit.which == "random":
            return self._drawn(layer, n_heads).to(z.device) & rows[:, None]
        if not bool(rows.any()):
            return chosen
        known = self._plain if self._plain else self._without_images([layer])
        last = z[torch.arange(batch, device=z.device), self._last.to(z.device)][rows]
        found = divergence(last, known[layer].to(z.device))
        self._compared[layer] = found.distance, outliers(found.distance, found.activity)
        if self.edit.which == "lower":
            chosen[rows] = lower_half(found.distance)
        else:
            activity = found.activity if self.edit.outlier_test else None
            chosen[rows] = upper_half(found.distance, activity)
        return chosen

    def _drawn(self, layer: int, n_heads: int) -> Bool[Tensor, "batch head"]:
        """Half of the heads, other ones for each prompt and layer, the same in any batch."""
        drawn = torch.zeros(len(self._seeds), n_heads, dtype=torch.bool)
        for row, own in enumerate(self._seeds):
            generator = torch.Generator().manual_seed(own + 1009 * layer + 104729 * self.edit.seed)
            drawn[row, torch.randperm(n_heads, generator=generator)[: n_heads // 2]] = True
        return drawn

    def table(self, layer: int) -> pd.DataFrame:
        """A row a head: `row, head, distance, outlier, chosen`; NaN where nothing was compared."""
        heads = self.heads[layer].cpu()
        row, head = (index.flatten() for index in torch.meshgrid(
            torch.arange(len(heads)), torch.arange(heads.shape[1]), indexing="ij"
        ))  # fmt: skip
        distance = torch.full(heads.shape, torch.nan)
        outlier = torch.zeros_like(heads)
        if layer in self._compared:
            rows = self._with_image.cpu()
            distance[rows], outlier[rows] = (found.cpu() for found in self._compared[layer])
        columns = {"row": row, "head": head, "distance": distance.flatten()}
        columns |= {"outlier": outlier.flatten(), "chosen": heads.flatten()}
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()})
