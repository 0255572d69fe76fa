"""VTC: only the patches that the image encoder's CLS token looks at go into the language model.

With V^l[h, i, j] the weights of layer l of the encoder and f the layer that the features are from,

    E_j = sum over l = f - K + 1 ... f of [mean over heads h of V^l[h, CLS, j]]

of N patches the R with the largest E stay, in the order of the image. The others are dropped before
the projector, so the prompt has R tokens for an image; the positions of what is left are numbered
without gaps. The question plays no part, and no weight changes: prefill, cache and decoding get
shorter.

Source: Wang et al. 2024, "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs"
(VTC-CLS, arXiv 2412.05819), and its code, which takes one image at a time; there K = 7 of 24 layers
and R = 256, 128 or 64 of 576. As controls: `score="random"`, "uniform" (spread evenly over the
patches in their order), "least" (the R with the smallest E), and `n_layers=1`. "received" takes,
instead of what the CLS token gives, what patches receive from all tokens, also in encoders without
a CLS token.

For models that give every image the same tokens, patch by patch (LLaVA-1.5). LLaVA-NeXT lays tiles
and ends of lines between them, and Qwen-VL merges patches: they are refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.intervention.base import Hook, Intervention, InterventionError
from interp.model.class_rows import EncoderRows, Row, feature_layer, n_patches, tower_of
from interp.model.hooked import HookedModel
from interp.model.images import ImageError, image_token, listed

Score = Literal["class", "received", "random", "uniform", "least"]

ENTRANCE = "vision_projector.hook_in"


@dataclass(frozen=True, eq=False, repr=False)
class VTC(Intervention):
    """Keep `keep` patches of each image (R); the module's docstring says which.

    Prompts get shorter by it: `evaluate`, `compare` and the harnesses do that by themselves, and
    elsewhere `model.prepare(prompt)` does, inside the block. `n_layers` (K) is cut to the layers
    that there are. With R >= N nothing is changed.
    """

    keep: int
    n_layers: int = 7
    score: Score = "class"
    seed: int = 0

    def __post_init__(self):
        for name in ("keep", "n_layers"):
            if getattr(self, name) < 1:
                raise InterventionError(f"{name}={getattr(self, name)}: a whole number from 1 on.")
        if self.score not in get_args(Score):
            raise InterventionError(f"score={self.score!r}: one of {', '.join(get_args(Score))}.")

    def __repr__(self) -> str:
        layers = f" in {self.n_layers} layers" if self.n_layers > 1 else " in the last layer"
        how = {
            "class": f"that the CLS token looks at most{layers}",
            "least": f"that the CLS token looks at least{layers}",
            "received": f"that receive most{layers}",
            "random": f"drawn at random (seed {self.seed})",
            "uniform": "spread evenly",
        }
        return f"VTC(of each image the {self.keep} patches {how[self.score]}; in the prompt)"

    def prepare(self, prompt: dict[str, Any], model: HookedModel) -> dict[str, Any]:
        """The prompt with `keep` tokens for each image, spans moved along.

        Raises `ImageError` where its image tokens are not those of its images.
        """
        full, token = self._patches(model), image_token(model)
        n_images, ids = len(listed(prompt.get("image"))), list(prompt["input_ids"])
        found = ids.count(token)
        if self.keep >= full or (n_images and found == n_images * self.keep) or not found:
            return prompt
        if found % full or (n_images and found != n_images * full):
            raise ImageError(
                f"prompt: {found} image tokens, and an image of {model.name} has {full}; make the "
                "prompts with this model."
            )
        where, kept, seen = [0], [], 0
        for one in ids:
            stays = one != token or seen % full < self.keep
            seen += one == token
            kept += [one] * stays
            where.append(len(kept))
        spans = {
            name: None if span is None else [where[span[0]], where[span[1]]]
            for name, span in (prompt.get("spans") or {}).items()
        }
        return {**prompt, "input_ids": kept, "spans": spans}

    def image_tokens(self, n: int) -> int:
        """How many of an image's `n` tokens are left."""
        return min(n, self.keep)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One in each encoder layer that is looked at, and one where features are projected.

        Raises `ImageError` for a text-only model, one that arranges its features, or an encoder
        without the CLS token that is asked for.
        """
        full = self._patches(model)
        if self.keep >= full:
            return
        last, row = feature_layer(model), self._row
        first = max(0, last - self.n_layers + 1)
        layers = [] if row is None else list(range(first, last + 1))
        encoder = EncoderRows(model, [(layer, row) for layer in layers if row is not None])
        yield from encoder.hooks(features=False)
        yield ENTRANCE, partial(self._prune, encoder, layers)

    def kept(self, scores: Float[Tensor, "image patch"]) -> Int[Tensor, "image kept"]:
        """Which patches of each image stay, by their E, in the order of the image."""
        n = scores.shape[1]
        if self.score == "uniform":
            steps = torch.arange(self.keep, device=scores.device)
            chosen = ((2 * steps + 1) * n // (2 * self.keep)).expand(len(scores), -1)
        elif self.score == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(n, generator=generator)[: self.keep]
            chosen = drawn.to(scores.device).expand(len(scores), -1)
        else:  # a stable sort: of equal ones the first
            order = scores.argsort(dim=1, descending=self.score != "least", stable=True)
            chosen = order[:, : self.keep]
        return chosen.sort(dim=1).values

    @property
    def _row(self) -> Row | None:
        rows: dict[str, Row] = {"class": "class", "least": "class", "received": "received"}
        return rows.get(self.score)

    def _prune(
        self,
        encoder: EncoderRows,
        layers: list[int],
        features: Float[Tensor, "image patch width"],
        hook,
    ) -> Float[Tensor, "image kept width"]:
        scores = features.new_zeros(features.shape[:2], dtype=torch.float32)
        row = self._row
        for layer in layers:
            assert row is not None
            scores = scores + torch.stack(encoder.of(layer, row)).to(scores)
        index = self.kept(scores)
        return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))

    def _patches(self, model: HookedModel) -> int:
        tower_of(model)
        config = model.original_model.config
        full = n_patches(model)
        if getattr(config, "model_type", None) != "llava" or full is None:
            raise ImageError(
                f"VTC: {model.name} ({model.cfg.architecture}) arranges the features of its "
                "patches by their place in the image, so none can be left out; give a model of "
                "LLaVA-1.5's kind, such as 'mini-llava'."
            )
        return full
