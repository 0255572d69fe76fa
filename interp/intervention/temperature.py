"""Temperature of attention: how sharply a head's queries choose, by head, by position, by token.

Every logit of query i of a head is multiplied by

    tau_i = (1 / T) * (1 + tanh(w . gelu(q_i)) + a log n_i)          (tau_i > 1 sharpens)

with q_i before rotation and n_i the number of keys that it may see. T is a temperature in the usual
sense; at T = 1, a = 0, w = 0 nothing changes. Multiplying logits is multiplying q_i, so no pattern
is made, weights still sum to 1, and which key a row likes best stays what it was. Where a model
caps its logits softly, q is scaled before the cap; a virtual sink's logit is not scaled.

Source: Zhang et al. 2024, "Selective Attention: Enhancing Transformer through Principled Context
Control" (SSA, arXiv 2411.12892), the query's part: 1 + tanh(f(x_i)) + sigma(alpha) log i, where
tau is called temperature and is its inverse. Its code has the term in log i alone, one number a
layer, and counts rows, not keys, so that with a KV cache nothing is sharpened. Here f reads the
head's own query through one vector w (f of the paper may be larger), a starts near 0 and stays at
or above it, and padding is not counted. The paper's temperature of values is not in it.

Derivatives at one row, with s_ij its logits before tau, a_ij its weights, s' = sum_j a_ij s_ij:

    dz_i / dtau = sum_j a_ij (s_ij - s') v_j        dH_i / dtau = -tau * Var_a(s_i)  <= 0
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import gelu

from interp.heads import Head, HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import by_layer, check_when, chosen, said, said_when
from interp.intervention.descent import Tuning, descend
from interp.intervention.head_tuning import Lesson, frozen
from interp.intervention.objectives import AnswerLoss
from interp.intervention.offsets import rows_by_layer
from interp.model.attention import Attention
from interp.model.call import When
from interp.model.edits import Block
from interp.model.hooked import HookedModel
from interp.tasks.prompts import as_prompts

PARTS = ("head", "position", "token")
FIT = Tuning(lr=1e-2, epochs=3)

PerHead = Float[Tensor, " head"]
Numbers = tuple[PerHead, PerHead, Float[Tensor, "head d_head"] | None]


@dataclass(frozen=True, eq=False, repr=False)
class Temperature(Intervention):
    """Multiply the logits of `heads` by tau, as in the module's docstring.

    `temperature` (T) and `slope` (a) are a number for all heads or one for each of `heads` as
    given; `token[i]` is w of `heads[i]`. Heads are then kept in their order; None is all of the
    model's, which then share their numbers. `Temperature.fit` learns a and w (SSA), or T.
    """

    heads: HeadsLike | None = None
    temperature: float | PerHead = 1.0
    slope: float | PerHead = 0.0
    token: Float[Tensor, "head d_head"] | None = None
    when: When = "both"

    def __post_init__(self):
        given = None if self.heads is None else heads_of(self.heads)
        object.__setattr__(self, "heads", chosen(self.heads))
        check_when(self.when)
        for name, dims in (("temperature", 1), ("slope", 1), ("token", 2)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                self._check(name, value, dims)
                order = sorted(range(len(value)), key=(given or ()).__getitem__)
                object.__setattr__(self, name, value[order])
            elif value is not None:
                object.__setattr__(self, name, float(value))
        if not bool((torch.as_tensor(self.temperature) > 0).all()):
            raise InterventionError(f"temperature={self.temperature}: must be above 0.")
        if not bool((torch.as_tensor(self.slope) >= 0).all()):
            raise InterventionError(
                f"slope={self.slope}: from 0 on; below it, tau may fall below 0 in a long text."
            )

    def _check(self, name: str, value: Tensor, dims: int) -> None:
        if self.heads is None:
            raise InterventionError(
                f"{name}: one for each of `heads`, so name them; for all heads alike, a number."
            )
        if value.dim() != dims or len(value) != len(self.heads):
            form = "[heads]" if dims == 1 else "[heads, d_head]"
            shape, n = list(value.shape), len(self.heads)
            raise InterventionError(f"{name}: {shape}, and should be {form} with {n} heads.")
        if not torch.isfinite(value).all():
            raise InterventionError(f"{name}: holds NaN or infinite numbers.")

    def __repr__(self) -> str:
        parts = [f"logits divided by {_said(self.temperature)}"]
        if bool((torch.as_tensor(self.slope) != 0).any()):
            parts.append(f"sharper by {_said(self.slope)} a factor e of visible keys")
        if self.token is not None:
            parts.append("and by what each query is")
        return f"Temperature({said(self.heads)}; {', '.join(parts)}; {said_when(self.when)})"

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        heads: HeadsLike | None = None,
        parts: Sequence[str] = ("position", "token"),
        when: When = "both",
        *,
        validation=0.2,
        tuning: Tuning = FIT,
        seed: int = 0,
        progress: bool = True,
    ) -> "Temperature":
        """Learn numbers for `heads` (None: each of the model's) from what follows in `prompts`.

        Args:
            prompts: With answers, whose loss is made small; or texts, and then the loss of all
                their tokens but the first.
            parts: Of "head" (T), "position" (a) and "token" (w), which are learned.
            validation: Prompts, or the share of `prompts`, whose loss says which epoch was best;
                None: the last one.
            seed: Which prompts are held out, and in which order the others come.

        Raises:
            TuningError: A loss that is not finite, a validation share that leaves no prompts.
            InterventionError: A part that there is not.
        """
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise InterventionError(f"parts={tuple(parts)}: some of {', '.join(PARTS)}.")
        if heads is None:
            everyone = by_layer(model, None).items()
            heads = [Head(layer, head) for layer, own in everyone for head in own]
        heads = tuple(sorted(heads_of(heads)))
        lesson = Lesson(_with_answers(model, prompts), _held(model, validation), seed=seed)
        train, held = lesson.split(model)
        learning = _Learning(model, heads, parts)
        hooks = hooks_of(model, heads, learning.numbers, when)
        with frozen(model), model.hooks(fwd_hooks=list(hooks)):
            descend(
                learning.leaves,
                AnswerLoss(model, train),
                len(train),
                tuning,
                seed=seed,
                held_out=None
                if held is None
                else partial(AnswerLoss(model, held).mean, tuning.batch_size),
                desc="temperature" if progress else None,
            )
        return learning.result(cls, when)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched.

        Raises `HeadError` where the model lacks a head, `InterventionError` where its heads are of
        another width.
        """
        numbers = by_layer(model, self.heads)
        if self.token is not None and self.token.shape[1] != model.cfg.d_head:
            raise InterventionError(
                f"token: made for heads of width {self.token.shape[1]}, and {model.name} has "
                f"{model.cfg.d_head}. Fit it on this model."
            )
        if self._does_nothing:
            return []
        heads = [Head(layer, head) for layer, own in numbers.items() for head in own]
        return hooks_of(model, heads, self._numbers, self.when)

    @property
    def _does_nothing(self) -> bool:
        ones = bool((torch.as_tensor(self.temperature) == 1).all())
        return ones and not bool((torch.as_tensor(self.slope) != 0).any()) and self.token is None

    def _numbers(self, rows: list[int]) -> Numbers:
        temperature, slope = (
            value[rows] if isinstance(value, Tensor) else torch.full((len(rows),), float(value))
            for value in (self.temperature, self.slope)
        )
        return temperature, slope, None if self.token is None else self.token[rows]


def hooks_of(
    model: HookedModel,
    heads: Sequence[Head],
    numbers: Callable[[list[int]], Numbers],
    when: When,
) -> Iterable[Hook]:
    """One hook per layer touched; `numbers` gives T, a and w of some of `heads` (sorted)."""
    for layer, (rows, own) in rows_by_layer(heads).items():

        def scale(attention: Attention, hook, rows=rows, own=own) -> Attention | None:
            at = model.call.rows(when).to(attention.q.device)
            if not at.any():
                return None
            tau = torch.where(at[:, None], sharpness(attention, own, *numbers(rows)), 1.0)
            index = torch.tensor(own, device=attention.q.device)
            # float32: bf16 has no number between 1 and 1.0078
            scaled = attention.q[:, own].float() * tau[..., None]
            return replace(attention, q=attention.q.index_copy(1, index, scaled.to(attention.q)))

        yield f"blocks.{layer}.attn.hook_attention", scale


def sharpness(
    attention: Attention,
    heads: list[int],
    temperature: PerHead,
    slope: PerHead,
    token: Float[Tensor, "head d_head"] | None,
) -> Float[Tensor, "batch head query"]:
    """tau of each query of some heads; `temperature`, `slope` and `token` are theirs."""
    device = attention.q.device
    tau = 1 + slope.to(device)[:, None] * keys_seen(attention).float().log()[:, None]
    if token is not None:
        q = attention.q if attention.q_unrotated is None else attention.q_unrotated
        score = torch.einsum("bhqd,hd->bhq", gelu(q[:, heads].float()), token.to(device).float())
        tau = tau + score.tanh()
    tau = tau / temperature.to(device)[:, None]
    return tau.expand(len(attention.q), len(heads), attention.n_queries)


def keys_seen(attention: Attention) -> Int[Tensor, "batch query"]:
    """How many keys each query may see, itself among them; 1 for padding."""
    if attention.mask is None and attention.causal:
        return attention.positions + 1
    if attention.mask is None:
        return attention.real_keys.sum(1, keepdim=True).expand_as(attention.positions)
    every = torch.arange(attention.n_queries, device=attention.q.device)
    visible = attention.visible(Block(None, every, attention.n_keys))
    if visible is None:
        return attention.real_keys.sum(1, keepdim=True).expand_as(attention.positions)
    seen = (visible.any(1) & attention.real_keys[:, None]).sum(-1)
    return seen.expand_as(attention.positions).clamp_min(1)


class _Learning:
    """What is learned, free to be any number, and what it stands for."""

    def __init__(self, model: HookedModel, heads: tuple[Head, ...], parts: Sequence[str]):
        self.heads, device = heads, model.cfg.device
        n, width = len(heads), model.cfg.d_head
        # |x| has no slope at 0, so a begins a little above it
        start = {
            "head": torch.zeros(n, device=device),
            "position": torch.full((n,), 1e-3, device=device),
            "token": torch.zeros(n, width, device=device),
        }
        self.free = {part: start[part].requires_grad_() for part in PARTS if part in parts}

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.free.values())

    def numbers(self, rows: list[int]) -> Numbers:
        device = self.leaves[0].device
        temperature = torch.ones(len(rows), device=device)
        slope = torch.zeros(len(rows), device=device)
        if "head" in self.free:
            temperature = self.free["head"][rows].exp()
        if "position" in self.free:
            slope = self.free["position"][rows].abs()
        return temperature, slope, self.free["token"][rows] if "token" in self.free else None

    def result(self, kind: type[Temperature], when: When) -> Temperature:
        with torch.no_grad():
            temperature, slope, token = self.numbers(list(range(len(self.heads))))
        return kind(
            self.heads,
            temperature.cpu() if "head" in self.free else 1.0,
            slope.cpu() if "position" in self.free else 0.0,
            None if token is None else token.detach().cpu(),
            when,
        )


def _with_answers(model: HookedModel, prompts) -> Dataset:
    """Prompts as they are; of texts the first token, with the others as its answer."""
    prompts = as_prompts(model, prompts)
    if "answer_ids" in prompts.column_names and any(prompts["answer_ids"]):
        return prompts
    short = [n for n, ids in enumerate(prompts["input_ids"]) if len(ids) < 2]
    if short:
        raise InterventionError(f"prompts: text {short[0]} has one token; a loss needs two.")
    texts = prompts["input_ids"]
    left = [name for name in ("input_ids", "answer_ids") if name in prompts.column_names]
    cut = prompts.remove_columns(left).add_column("input_ids", [ids[:1] for ids in texts])
    return cut.add_column("answer_ids", [ids[1:] for ids in texts])


def _held(model: HookedModel, validation):
    if validation is None or isinstance(validation, float):
        return validation
    return _with_answers(model, validation)


def _said(value: float | Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}"
    return f"{float(value.min()):.3g} to {float(value.max()):.3g}" if len(value) else "nothing"
