"""VAR, visual attention redistribution: what heads waste on sinks goes to the rest of the image.

Some tokens, of the image too, are looked at by nearly every query whatever they hold. They are told
by a few coordinates of the residual stream, D, in which they are huge: with x_j what enters the
block at token j,

    phi_j = max over d in D of |x_j[d]| / rms(x_j),    S = {j : phi_j >= tau}

Let I be the image's tokens and R = I without S; m_i, r_i and M_i what row i holds on S, on R and on
all of I. Each row of text, prompt's or generated, in each head by itself, is edited where

    M_i >= min_image_mass    and    r_i / M_i >= min_non_sink        (the head looks at the picture)

    a'_is = (1 - p) a_is for s in S,    a'_ij = a_ij (1 + p m_i / r_i) for j in R,    p = `moved`

so a row keeps its sum and gains p times the mass of the *text's* sinks for the image; those of the
image only reshuffle what it has. S comes from what enters the block, edits below it included; a
generated token is never in it. `interp.model.redistributed` has the closed form.

Source: Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
(arXiv 2503.03321), and its code. The code's `p` and `rho` are the complements of the paper's and of
ours (`VAR.from_reference`), it edits the last layer, and it looks for sinks once a process. tau is
20 in a model of width 4096; phi is at most the square root of the width, so by default tau is
scaled with that: a coordinate that holds 9.8 % of the vector's energy. Re-runs by others show no
clear gain against hallucination: measure it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analysis.sink_dimensions import phi, scaled_tau, sink_dimensions
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import check_when, said_when
from interp.intervention.marks import ImageMarks, LayerSets, Marks, goes_on_writing
from interp.model.attention import Attention
from interp.model.call import When
from interp.model.hooked import HookedModel
from interp.model.images import image_token
from interp.model.redistributed import Moved, redistributed

Donors = Literal["all", "text", "image"]
Choice = Literal["image-centric", "random", "all"]
Which = Literal["found", "random"]


@dataclass(frozen=True, eq=False, repr=False)
class VAR(Intervention):
    """Move the share `moved` of sinks' attention to the image's other tokens.

    Args:
        dimensions: D. `VAR.fit` finds them.
        tau: Default 20 * sqrt(width / 4096).
        min_non_sink: Least r / M of a row that is edited; the paper has 0.5 against hallucination,
            0.8 for questions in general, 0.9 for those about the image alone.
        layers: Numbers, or a slice such as "2:-1" (default: all but the first two and the last).
        require_visual_sink: Leave a layer alone in which no image token of the prompt is in S.

    Controls: `choose="all"` edits every row that holds anything on R, `"random"` as many heads of
    each row as the rule chooses; `sinks="random"` takes the same mass (or what there is) from as
    many random other tokens, image for image and text for text; `donors` are only the sinks of the
    image, or of the text. `seed` draws. With random sinks the edit is not causal over the prompt.

    Without its KV cache Hugging Face's `generate` reads all it wrote as a prompt, and a generated
    token may then be a sink.
    """

    dimensions: Sequence[int]
    tau: float | None = None
    min_non_sink: float = 0.5
    min_image_mass: float = 0.2
    moved: float = 0.6
    layers: Sequence[int] | slice | str = "2:-1"
    require_visual_sink: bool = True
    donors: Donors = "all"
    choose: Choice = "image-centric"
    sinks: Which = "found"
    when: When = "both"
    seed: int = 0

    def __post_init__(self):
        dimensions = tuple(sorted({int(d) for d in self.dimensions}))
        object.__setattr__(self, "dimensions", dimensions)
        if not dimensions or dimensions[0] < 0:
            raise InterventionError(
                f"dimensions={list(dimensions)}: indices of the residual stream, one at least; "
                "VAR.fit(model, prompts) finds them."
            )
        if self.tau is not None and not self.tau > 0:
            raise InterventionError(f"tau={self.tau}: above 0 (20 in a model of width 4096).")
        if not 0 <= self.moved <= 1:
            raise InterventionError(f"moved={self.moved}: a share of attention, from 0 to 1.")
        for name in ("min_non_sink", "min_image_mass"):
            if not getattr(self, name) >= 0:
                raise InterventionError(f"{name}={getattr(self, name)}: a share, from 0 on.")
        allowed = {"donors": Donors, "choose": Choice, "sinks": Which}
        for name, kind in allowed.items():
            if getattr(self, name) not in get_args(kind):
                value = getattr(self, name)
                raise InterventionError(f"{name}={value!r}: one of {', '.join(get_args(kind))}.")
        check_when(self.when)
        object.__setattr__(self, "layers", as_layers(self.layers))

    def __repr__(self) -> str:
        over = "scaled" if self.tau is None else f"{self.tau:g}"
        whose = {"all": "sinks", "image": "sinks of the image", "text": "sinks of the text"}
        from_what = whose[self.donors]
        if self.sinks == "random":
            from_what = f"random tokens (seed {self.seed}) in place of {from_what}"
        which = {
            "image-centric": f"in rows with {self.min_image_mass:g} or more on it and "
            f"{self.min_non_sink:g} of that on no sink",
            "random": f"in as many random heads (seed {self.seed}) as hold "
            f"{self.min_image_mass:g} or more on it and {self.min_non_sink:g} of that on no sink",
            "all": "in all heads",
        }[self.choose]
        dims = ", ".join(map(str, self.dimensions))
        at = self.layers if isinstance(self.layers, str) else ", ".join(map(str, self.layers))
        always = "" if self.require_visual_sink else ", also without a sink in the image"
        return (
            f"VAR({self.moved:g} of what {from_what} hold (dimensions {dims}, tau {over}) goes to "
            f"the image, {which}; layers {at}{always}; {said_when(self.when)})"
        )

    @classmethod
    def from_reference(
        cls, p: float, rho: float, dimensions: Sequence[int], tau: float = 20.0, summ: float = 0.2
    ) -> "VAR":
        """The parameters as the authors' code has them: `p` is what sinks keep, `rho` the most
        that they may hold of the image's mass, and the last layer is edited."""
        return cls(
            dimensions,
            tau,
            min_non_sink=1 - rho,
            min_image_mass=summ,
            moved=1 - p,
            layers="2:",
        )

    @classmethod
    def fit(cls, model: HookedModel, prompts, *, batch_size: int = 8, **settings) -> "VAR":
        """With the sink dimensions found on `prompts` (some 30 of them are enough).

        Raises `VisualSinkError` where the model has none.
        """
        found = sink_dimensions(model, prompts, tau=settings.get("tau"), batch_size=batch_size)
        return cls(found.needed(), **settings)

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """False with random sinks: how many are drawn is known from the whole prompt."""
        return self.sinks == "found"

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """Two hooks a layer: one finds its sinks, the other edits.

        Raises `ImageError` for a text-only model, `InterventionError` for dimensions or layers that
        it does not have.
        """
        image_token(model)
        width = model.cfg.d_model
        if self.dimensions[-1] >= width:
            raise InterventionError(
                f"dimensions: {self.dimensions[-1]} is not in {model.name}, whose residual stream "
                f"has 0-{width - 1}."
            )
        tau = scaled_tau(width) if self.tau is None else self.tau
        if tau > width**0.5:
            raise InterventionError(
                f"tau={tau:g}: nothing can be a sink, since phi is at most sqrt({width}) = "
                f"{width**0.5:.1f} in {model.name}; the default is {scaled_tau(width):.2f}."
            )
        if self.moved == 0:
            return
        image, sets = ImageMarks(model), LayerSets()
        for layer in chosen_layers(self.layers, model):
            edit = _Layer(self, model, image, sets, tau, layer)
            yield f"blocks.{layer}.hook_resid_pre", edit.find
            yield f"blocks.{layer}.attn.hook_attention", edit.edit


class _Layer:
    """The edit of one layer, for one block."""

    def __init__(
        self,
        rule: VAR,
        model: HookedModel,
        image: ImageMarks,
        sets: LayerSets,
        tau: float,
        layer: int,
    ):
        self.rule, self.model, self.image, self.sets = rule, model, image, sets
        self.tau, self.layer = tau, layer
        self.sinks = Marks()
        self.seed = rule.seed * 1009 + layer

    def find(self, x: Float[Tensor, "batch token d_model"], hook) -> None:
        """Which of the prompt's tokens are sinks of this layer."""
        call = self.model.call
        self.image.see(call)
        if not goes_on_writing(call):
            sinks = phi(x, self.rule.dimensions) >= self.tau
            self.sinks.add(sinks.to(call.real.device), call)
            self.sets.begin(call)

    def edit(self, attention: Attention, hook) -> Attention | None:
        call = self.model.call
        rows, columns = self.image.text(self.rule.when, call, attention.q.device)
        if not len(columns):
            return None
        if self.layer in self.sets:
            sets = self.sets.at_keys(self.layer, attention, call)
        else:
            sets = self._sets_of(attention)
            self.sets.add(self.layer, sets, attention, call)
        edited = redistributed(attention, sets, rows, columns, self._choose)
        return None if edited is attention else edited

    def _sets_of(self, attention: Attention) -> Bool[Tensor, "batch set key"]:
        """Donors, receivers, the image's tokens that are no sinks, the image, whose mass moves."""
        rule = self.rule
        image, sinks = self.image.at_keys(attention), self.sinks.at_keys(attention)
        visual = sinks & image
        whose = {"all": sinks, "text": sinks & ~image, "image": visual}[rule.donors]
        donors = whose if rule.sinks == "found" else self._others(whose, sinks, image, attention)
        kept = image & ~sinks
        receivers = kept & ~donors
        if rule.require_visual_sink:  # a row without receivers stays as it is
            receivers = receivers & visual.any(1, keepdim=True)
        return torch.stack([donors, receivers, kept, image, whose], dim=1)

    def _choose(
        self,
        mass: Float[Tensor, "batch head rows set"],
        allowed: Bool[Tensor, "batch 1 rows"],
        index: Int[Tensor, " rows"],
    ) -> Moved:
        """Which heads look at the picture, row by row, and what share of donors' mass to move."""
        rule = self.rule
        given, _, non_sink, on_image, whole = mass.unbind(-1)
        chosen = allowed
        if rule.choose != "all":
            chosen = on_image >= rule.min_image_mass
            chosen = chosen & (non_sink >= rule.min_non_sink * on_image)
        if rule.choose == "random":
            places = self.model.call.positions.to(mass.device)
            chosen = as_many(chosen & allowed, allowed, places[:, index], self.seed)
        if rule.sinks == "found":
            return Moved(chosen, rule.moved)
        tiny = torch.finfo(given.dtype).tiny
        return Moved(chosen, (rule.moved * whole / given.clamp_min(tiny)).clamp(0, 1))

    def _others(
        self,
        donors: Bool[Tensor, "batch key"],
        sinks: Bool[Tensor, "batch key"],
        image: Bool[Tensor, "batch key"],
        attention: Attention,
    ) -> Bool[Tensor, "batch key"]:
        """As many tokens of the prompt that are no sinks, image for image and text for text."""
        lengths = self.model.call.prompt_lengths.to(image.device)
        own = attention.real_keys & (attention.key_positions < lengths[:, None]) & ~sinks
        order = drawn(attention.key_positions, 1, self.seed)[..., 0]
        found = torch.zeros_like(donors)
        for kind in (image, ~image):
            ranks = torch.where(own & kind, order, torch.inf).argsort(-1).argsort(-1)
            found |= own & kind & (ranks < (donors & kind).sum(-1, keepdim=True))
        return found


def as_many(
    chosen: Bool[Tensor, "batch head rows"],
    allowed: Bool[Tensor, "batch 1 rows"],
    places: Int[Tensor, "batch rows"],
    seed: int,
) -> Bool[Tensor, "batch head rows"]:
    """As many random heads in each row as are chosen there."""
    order = drawn(places, chosen.shape[1], seed).transpose(1, 2)
    ranks = order.argsort(1).argsort(1)
    return (ranks < chosen.sum(1, keepdim=True)) & allowed


def drawn(places: Int[Tensor, "batch token"], n: int, seed: int) -> Float[Tensor, "batch token n"]:
    """n random numbers for each place, the same in any batch."""
    generator = torch.Generator().manual_seed(seed)
    # row by row, so that a longer prompt only adds numbers
    numbers = torch.rand(int(places.max()) + 1, n, generator=generator)
    return numbers.to(places.device)[places]


def as_layers(layers: Any) -> tuple[int, ...] | str:
    """Numbers, or a slice as text. Raises `InterventionError` for anything else."""
    if isinstance(layers, slice):
        parts = ("" if part is None else str(part) for part in (layers.start, layers.stop))
        layers = ":".join(parts) + ("" if layers.step is None else f":{layers.step}")
    if isinstance(layers, str):
        try:
            slice(*(int(part) if part else None for part in layers.split(":")))
        except (ValueError, TypeError):
            layers = None
        if layers is None or ":" not in layers:
            raise InterventionError('layers: numbers, or a slice such as "2:-1".')
        return layers
    return tuple(sorted({int(layer) for layer in layers}))


def chosen_layers(layers: tuple[int, ...] | str, model: HookedModel) -> list[int]:
    """Which of the model's layers these are. Raises where it has none such."""
    if not isinstance(layers, str):
        model.check_layers(layers)
        return list(layers)
    bounds = slice(*(int(part) if part else None for part in layers.split(":")))
    found = [i for i in range(len(model.blocks))[bounds] if i in model.attention_layers]
    if not found:
        raise InterventionError(
            f"layers={layers!r}: none of the {len(model.blocks)} layers of {model.name}; give "
            'others, such as layers=":".'
        )
    return found
