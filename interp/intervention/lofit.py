"""LoFiT: learn which heads to change, then one vector for each of them, and no weight.

With z_t[h] the output of head h at token t, before W_O, both stages edit

    z_t[h] <- (1 + A[h]) * z_t[h] + v[h]          (* element by element)

1. *Selection.* A is learned for all heads of all layers, v = 0; the loss is the task's plus
   lambda sum |A|. A head's score is the Euclidean norm of A[h].
2. *Offsets.* A = 0, and v is learned for the K best heads alone.

What is kept is v: K x d_head numbers, added at every token.

Source: Yin, Ye & Durrett 2024, "LoFiT: Localized Fine-tuning on LLM Representations" (arXiv
2406.01563) and its code, whose rates are the defaults. Differences: the best epoch on held-out
prompts is kept instead of the last one, and the preference loss is measured against the untouched
model. lambda depends on the model's size: keep lambda x (number of elements of A) x mean |A| a
small share of the task's loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from interp.heads import HeadScores, HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention
from interp.intervention.chosen import said
from interp.intervention.descent import Tuning
from interp.intervention.folding import FoldError, fold_offsets
from interp.intervention.head_tuning import Keeping, Lesson, learned_offsets, scaling_norms
from interp.intervention.objectives import Kind
from interp.intervention.offsets import (
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

SELECTION = Tuning(lr=5e-3, l1=1e-3)
OFFSETS = Tuning(lr=1e-2)


@dataclass(frozen=True, eq=False, repr=False)
class LoFiT(Intervention):
    """Add `strength` times `vectors[i]` to z of `heads[i]`, as given; kept in the heads' order.

    It was learned at all tokens (`when="both"`) and with `strength` 1; 0 is the model as it was.
    """

    heads: HeadsLike
    vectors: Float[Tensor, "head d_head"]
    strength: float = 1.0
    when: When = "both"

    def __post_init__(self):
        check_width("vectors", self.vectors)
        check_settings(self.when, "all", self.strength)
        heads, ordered = in_order(self.heads, {"vectors": self.vectors})
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "vectors", ordered["vectors"])

    def __repr__(self) -> str:
        times = "" if self.strength == 1 else f" times {self.strength:g}"
        return (
            f"LoFiT({said(self.heads)}; a learned vector each added{times}; "
            f"{said_of_tokens(self.when, 'all')})"
        )

    @classmethod
    def select(
        cls,
        model: HookedModel,
        prompts,
        *,
        validation=0.2,
        objective: Kind = "answers",
        beta: float = 0.5,
        tuning: Tuning = SELECTION,
        seed: int = 0,
        out: str | Path | None = None,
        resume: bool = True,
        progress: bool = True,
    ) -> HeadScores:
        """Stage 1: each head's score is the norm of its learned scaling.

        Args:
            prompts: Anything that `as_prompts` reads, with answers; for preferences with wrong ones
                too (see `interp.tasks.continuations`).
            validation: Prompts, or the share of `prompts`, whose loss says which epoch was best;
                None: the last one.
            objective: "answers" (cross-entropy on their tokens) or "preferences" (DPO, `beta`).
            out: Folder for checkpoints: a run that was stopped goes on there.

        Raises:
            PromptError: A prompt without an answer (or a wrong one).
            TuningError: A loss that is not finite, a validation share that leaves no prompts.
        """
        lesson = Lesson(prompts, validation, objective, beta, seed)
        return scaling_norms(model, lesson, tuning, Keeping(out, resume, progress))

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        heads: HeadsLike | None = None,
        *,
        k: int | float = 0.1,
        validation=0.2,
        objective: Kind = "answers",
        beta: float = 0.5,
        selection: Tuning = SELECTION,
        tuning: Tuning = OFFSETS,
        seed: int = 0,
        out: str | Path | None = None,
        resume: bool = True,
        progress: bool = True,
    ) -> "LoFiT":
        """Stage 2 on `heads`, or on the `k` best of stage 1 (a float: that share of all heads).

        Other arguments as in `select`; `out` has a folder for each stage, with what happened in
        `history.parquet`. Heads chosen on another task, or at random, are the controls.
        """
        lesson = Lesson(prompts, validation, objective, beta, seed)
        keeping = Keeping(out, resume, progress)
        if heads is None:
            scores = scaling_norms(model, lesson, selection, keeping.within("heads"))
            heads = top_heads(scores, k)
        heads = tuple(sorted(heads_of(heads)))
        vectors = learned_offsets(model, heads, lesson, tuning, keeping.within("offsets"))
        return cls(heads, vectors)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched.

        Raises `HeadError` where the model lacks a head, `InterventionError` where its heads are of
        another width.
        """
        return offset_hooks(model, self.heads, self.strength * self.vectors, self.when, "all")

    def describe(self, model: HookedModel | None = None) -> str:
        """As all interventions; with a model its size beside the model's."""
        lines = super().describe(model)
        size = "" if model is None else f"\n{said_of_size(model, self.vectors.numel())}"
        return lines + size

    def fold(self, model: HookedModel) -> PreTrainedModel:
        """A plain copy of the model that says what the edited one says, at no cost.

        Save it with `save_pretrained`, or hand it to `interp.load(copy, tokenizer)`. Raises
        `FoldError` where the edit is not at all tokens, or the architecture has no place for it.
        """
        if self.when != "both":
            raise FoldError(f"fold: when={self.when!r}; weights act at all tokens, when='both'.")
        check_fits(model, self.heads, self.vectors)
        return fold_offsets(model, by_layer(model, self.heads, self.strength * self.vectors))
