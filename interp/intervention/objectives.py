"""What is learned from prompts: their answers, or to prefer one answer to another.

- `answers`: -log p(token), the mean over all tokens of the answers in a batch.
- `preferences`: with y+ and y- the right and a wrong answer, log p(y) the sum over the tokens of y,
  and p0 the model as it is when learning begins,

      -log sigmoid(beta [(log p(y+) - log p0(y+)) - (log p(y-) - log p0(y-))])

  (DPO: Rafailov et al. 2023, arXiv 2305.18290), the mean over a batch.

Source: the two losses of Yin, Ye & Durrett 2024 (LoFiT, arXiv 2406.01563), who take beta = 0.5.
Unlike in their code p0 is the untouched model, not one with the noise that learning begins from.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Literal, get_args

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from interp.errors import UserError
from interp.evaluation import answer_rows
from interp.model.hooked import HookedModel
from interp.tasks.continuations import answers_of, wrong_answers_of
from interp.tasks.prompts import spans_of

Kind = Literal["answers", "preferences"]


class ObjectiveError(UserError):
    """An objective that there is not."""


class Objective:
    """A loss over prompts: called with some of their rows, it has gradients."""

    def __init__(self, model: HookedModel, prompts: Dataset):
        self.model = model
        self.prompts = [list(ids) for ids in prompts["input_ids"]]
        self.right = answers_of(prompts)
        self.spans = spans_of(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, rows: list[int]) -> Float[Tensor, ""]:
        """The mean loss of these rows."""
        losses, weights = self.parts(rows)
        return losses.sum() / weights

    @torch.no_grad()
    def mean(self, batch_size: int) -> float:
        """The mean loss of all rows."""
        rows = sorted(range(len(self)), key=lambda row: -len(self.prompts[row]))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        parts = [self.parts(batch) for batch in batches]
        return sum(float(losses.sum()) for losses, _ in parts) / sum(n for _, n in parts)

    def parts(self, rows: list[int]) -> tuple[Float[Tensor, " batch"], int]:
        """Each row's loss, and how many tokens or rows these are losses of."""
        raise NotImplementedError

    def log_probs(
        self, rows: list[int], answers: Sequence[list[int]]
    ) -> tuple[Float[Tensor, "batch answer"], Bool[Tensor, "batch answer"]]:
        """Log-probability of each token of an answer to each of these prompts; which are real."""
        prompts = [self.prompts[row] for row in rows]
        # the last answer token predicts nothing that is asked for
        lists = [[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
        batch = self.model.batch(lists)
        target, real = answer_rows(answers, batch.input_ids.device)
        spans = None if self.spans is None else [self.spans[row] for row in rows]
        keep, n = {}, target.shape[1]
        if "logits_to_keep" in signature(self.model.original_model.forward).parameters:
            keep["logits_to_keep"] = n
        with (
            self.model.hooks(fwd_hooks=[("unembed.hook_in", _without_gaps)]),
            self.model.spans(spans, [len(ids) for ids in prompts]),
        ):
            logits = self.model(
                batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **keep
            )
        found = logits[:, -n:].float().log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
        return torch.where(real, found, 0), real


class AnswerLoss(Objective):
    """Negative log-likelihood of the answers, a mean over their tokens."""

    def parts(self, rows: list[int]) -> tuple[Float[Tensor, " batch"], int]:
        found, real = self.log_probs(rows, [self.right[row] for row in rows])
        return -found.sum(1), int(real.sum())


class PreferenceLoss(Objective):
    """The loss of preferring wrong answers to right ones, beside what the model does now."""

    def __init__(self, model: HookedModel, prompts: Dataset, beta: float, batch_size: int):
        super().__init__(model, prompts)
        self.wrong = wrong_answers_of(model, prompts)
        self.beta = beta
        rows = list(range(len(self)))
        with torch.no_grad():
            parts = [self.margin(rows[i : i + batch_size]) for i in rows[::batch_size]]
        self.before = torch.cat(parts)

    def parts(self, rows: list[int]) -> tuple[Float[Tensor, " batch"], int]:
        gain = self.margin(rows) - self.before[rows]
        return -logsigmoid(self.beta * gain), len(rows)

    def margin(self, rows: list[int]) -> Float[Tensor, " batch"]:
        """log p(y+) - log p(y-), both in one batch."""
        answers = [self.right[row] for row in rows] + [self.wrong[row] for row in rows]
        right, wrong = self.log_probs(rows * 2, answers)[0].sum(1).chunk(2)
        return right - wrong


def objective_of(
    kind: Kind, model: HookedModel, prompts: Dataset, *, beta: float, batch_size: int
) -> Objective:
    """Raises `ObjectiveError` for another kind, `PromptError` where prompts lack an answer."""
    if kind == "answers":
        return AnswerLoss(model, prompts)
    if kind == "preferences":
        return PreferenceLoss(model, prompts, beta, batch_size)
    raise ObjectiveError(f"objective={kind!r}: one of {', '.join(get_args(Kind))}.")


def _without_gaps(last: Tensor, hook) -> Tensor:
    """Torch would copy a frozen unembedding for each row of a view: half of a step in bf16."""
    return last.contiguous()
