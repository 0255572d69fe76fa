"""What passes over pairs of prompts share: batches of pairs, and metrics of the answer's logits.

A metric takes the logits at the last token, `[batch d_vocab]`, and the batch's `Answers`, and gives
one number a pair. Pass one of `METRICS` by name, or any function of that form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import UserError
from interp.model.hooked import Batch, HookedModel


class PairError(UserError):
    """Pairs, or a metric of them, that cannot be used as asked."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a metric may compare logits with; one row a pair."""

    right: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    clean_logits: Float[Tensor, "batch d_vocab"]


Position = int | str

Metric = Callable[[Float[Tensor, "batch d_vocab"], Answers], Float[Tensor, " batch"]]


def logit_diff(logits: Float[Tensor, "batch d_vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Logit of the right answer minus that of the wrong one."""
    chosen = torch.stack([answers.right, answers.wrong], dim=1)
    right, wrong = logits.gather(1, chosen).unbind(1)
    return right - wrong


def log_prob(logits: Float[Tensor, "batch d_vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Log-probability of the right answer, nats."""
    return logits.log_softmax(-1).gather(1, answers.right[:, None]).squeeze(1)


def prob(logits: Float[Tensor, "batch d_vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Probability of the right answer; blind to what lowers an answer that is near 0 already."""
    return log_prob(logits, answers).exp()


def neg_kl(logits: Float[Tensor, "batch d_vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """-KL(clean || patched) over all tokens, nats: 0 on the clean run, below it elsewhere."""
    clean = answers.clean_logits.log_softmax(-1)
    return (clean.exp() * (logits.log_softmax(-1) - clean)).sum(-1)


METRICS: dict[str, Metric] = {
    "logit_diff": logit_diff,
    "log_prob": log_prob,
    "prob": prob,
    "kl": neg_kl,
}


def metric_of(metric: str | Metric) -> tuple[str, Metric]:
    """The name and function of a metric; `PairError` with the nearest names for an unknown one.

    The function's result is checked: one finite number a pair, or `PairError`.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            near = get_close_matches(metric, METRICS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise PairError(f"metric={metric!r}: one of {', '.join(METRICS)}, or a function.{hint}")
        name, function = metric, METRICS[metric]
    else:
        name, function = getattr(metric, "__name__", type(metric).__name__), metric

    def checked(
        logits: Float[Tensor, "batch d_vocab"], answers: Answers
    ) -> Float[Tensor, " batch"]:
        values: Any = function(logits, answers)
        if not torch.is_tensor(values) or values.shape != logits.shape[:1]:
            got = list(values.shape) if torch.is_tensor(values) else type(values).__name__
            raise PairError(
                f"metric={name}: gave {got} for {len(logits)} pairs; a metric takes logits "
                "[batch d_vocab] and Answers, and gives a tensor [batch]."
            )
        if not values.isfinite().all():
            raise PairError(
                f"metric={name}: not a finite number on {int((~values.isfinite()).sum())} of "
                f"{len(values)} pairs; are the model's activations finite in this dtype?"
            )
        return values

    return name, checked


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Some pairs, left-padded alike: a column is the same token's place in both prompts.

    `right` and `wrong` are answer tokens. `positions` are each pair's named columns.
    """

    clean: Batch
    corrupted: Batch
    right: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    positions: list[dict[str, int]]

    def __len__(self) -> int:
        return len(self.right)

    @property
    def attention_mask(self) -> Int[Tensor, "batch token"]:
        """The same for both prompts of a pair."""
        return self.clean.attention_mask

    @property
    def n_tokens(self) -> int:
        return self.attention_mask.shape[1]

    @property
    def after_difference(self) -> Bool[Tensor, "batch token"]:
        """From each pair's first token that differs on; before it, causal runs are the same."""
        return (self.clean.input_ids != self.corrupted.input_ids).cumsum(1) > 0

    @property
    def first_difference(self) -> int:
        """The first column where any pair's prompts differ; the last one where none does."""
        apart = self.after_difference.any(0)
        return int(apart.int().argmax()) if bool(apart.any()) else self.n_tokens - 1

    def answers(self, clean_logits: Float[Tensor, "batch d_vocab"]) -> Answers:
        """What metrics of this batch compare with."""
        return Answers(self.right, self.wrong, clean_logits)

    def at(self, position: Position | None) -> Bool[Tensor, "batch token"]:
        """The column of a position in each pair; None: all real tokens.

        A name, "end" (the last token) always among them, or a number: from each prompt's first
        token on, negative from its end. Raises `PairError` where a pair lacks it.
        """
        real = self.attention_mask.bool()
        if position is None:
            return real
        columns = torch.arange(self.n_tokens, device=real.device).expand_as(real)
        if position == "end" and not all("end" in row for row in self.positions):
            position = -1
        if isinstance(position, str):
            return columns == self.columns(position)[:, None]
        first, length = self.clean.first, real.sum(1)
        if not -int(length.min()) <= position < int(length.min()):
            raise PairError(f"position {position}: a pair has only {int(length.min())} tokens.")
        place = first + (position if position >= 0 else length + position)
        return columns == place[:, None]

    def columns(self, name: str) -> Int[Tensor, " batch"]:
        """The column of a named position in each pair."""
        missing = [n for n, row in enumerate(self.positions) if row.get(name) is None]
        if missing:
            known = ", ".join(sorted({name for row in self.positions for name in row}))
            raise PairError(f"position {name!r}: pair {missing[0]} has none such; it has {known}.")
        found = [row[name] for row in self.positions]
        return torch.tensor(found, device=self.right.device)


def pair_batch(model: HookedModel, pairs: Dataset) -> PairBatch:
    """All of `pairs` (see `interp.tasks.pairs`) as one batch on the model's device.

    Raises `PairError` where there are none, or these are no pairs.
    """
    lengths = check_pairs(pairs)
    clean = model.batch(list(pairs["clean_input_ids"]))
    corrupted = model.batch(list(pairs["corrupted_input_ids"]))
    device = clean.input_ids.device
    right, wrong = torch.tensor(list(pairs["answers"]), device=device).unbind(1)
    first = clean.first.tolist()
    named = pairs["positions"] if "positions" in pairs.column_names else [{}] * len(pairs)
    positions = []
    for n, (offset, row) in enumerate(zip(first, named, strict=True)):
        there = {name: p for name, p in (row or {}).items() if p is not None}
        outside = [name for name, p in there.items() if not 0 <= p < lengths[n]]
        if outside:
            raise PairError(
                f"position {outside[0]!r}: {there[outside[0]]} is outside pair {n}, which has "
                f"{lengths[n]} tokens."
            )
        positions.append({name: offset + p for name, p in there.items()})
    return PairBatch(clean, corrupted, right, wrong, positions)


def check_pairs(pairs: Dataset) -> list[int]:
    """How many tokens each pair has. Raises `PairError` where these are no pairs, or none."""
    missing = {"clean_input_ids", "corrupted_input_ids", "answers"} - set(pairs.column_names)
    if missing or not len(pairs):
        raise PairError(
            f"pairs: {'no rows' if not missing else 'no column ' + sorted(missing)[0]}; make them "
            "with interp.tasks.pairs(model, clean=..., corrupted=..., answers=...) or a task of "
            "pairs such as interp.tasks.ioi(model)."
        )
    lengths = []
    for n, row in enumerate(pairs.select_columns(["clean_input_ids", "corrupted_input_ids"])):
        one, other = len(row["clean_input_ids"]), len(row["corrupted_input_ids"])
        if one != other:
            raise PairError(
                f"pairs: pair {n} has {one} clean and {other} corrupted tokens; patching needs the "
                "same number, aligned token by token."
            )
        lengths.append(one)
    return lengths


def in_pair_batches(model: HookedModel, pairs: Dataset, size: int) -> Iterator[PairBatch]:
    """`pairs` in order, `size` at a time."""
    for start in range(0, len(pairs), size):
        yield pair_batch(model, pairs.select(range(start, min(start + size, len(pairs)))))
