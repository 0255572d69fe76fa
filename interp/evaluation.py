"""How well a model does on prompts, and what an intervention changes, each with an interval.

Teacher-forced (the default): the prompt and its answer go through the model once; an answer is
right when every one of its tokens is the argmax. `generate=True`: the model writes on greedily, and
an answer is right when it is what comes first. Shares have Wilson intervals, means and paired
differences bootstrap intervals (percentile, resampled over prompts).

Interventions that change prompts (`prepare`) do so here. Under one that is not causal (see
`Intervention.causal`) an answer still has a likelihood, and a prompt's own tokens have none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, bootstrap
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp.errors import UserError
from interp.model.call import Spans
from interp.model.hooked import HookedModel
from interp.model.images import images_of, of_images, written_out
from interp.tasks.prompts import about_of, as_prompts, describe, from_examples, spans_of

METRICS = ("accuracy", "loss", "logit_diff")
RESAMPLES = 2000


class EvaluationError(UserError):
    """Something that can't be measured on these prompts."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One row a prompt in `table`: `correct`, `loss` (nats a token), `logit_diff` (with choices).

    `loss` is the answer's, or the whole text's where a prompt has no answer. `logit_diff` is the
    logit of the right choice's first token minus the largest of the wrong ones; NaN, and left out
    of means, where a prompt's choices all begin with the same token.
    """

    table: pd.DataFrame
    metadata: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of prompts answered right; NaN where prompts have no answers."""
        return self._mean("accuracy")

    @property
    def loss(self) -> float:
        """Mean over prompts of the mean negative log-likelihood, nats per token."""
        return self._mean("loss")

    @property
    def logit_diff(self) -> float:
        """Mean over prompts; NaN where prompts have no choices."""
        return self._mean("logit_diff")

    def _mean(self, metric: str) -> float:
        values = _known(metric_values(self.table, metric))
        return float(values.mean()) if len(values) else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (of the loss where there is none)."""
        row = self.summary().iloc[0]
        return row["low"], row["high"]

    def summary(self) -> pd.DataFrame:
        """One row a metric: `metric, value, low, high, n`."""
        rows = []
        for metric in METRICS:
            values = _known(metric_values(self.table, metric))
            if len(values):
                low, high = _interval(metric, values)
                row = {"metric": metric, "value": values.mean(), "low": low, "high": high}
                rows.append(row | {"n": len(values)})
        return pd.DataFrame(rows)

    def by(self, *columns: str) -> pd.DataFrame:
        """The summary within each group of prompts, e.g. `by("length", "depth")`."""
        missing = [column for column in columns if column not in self.table]
        if missing:
            has = ", ".join(self.table.columns)
            raise EvaluationError(f"by={missing[0]!r}: the prompts have no such column; {has}.")
        groups = self.table.groupby(list(columns), sort=True)
        parts = [
            Evaluation(group, {}).summary().assign(**dict(zip(columns, key, strict=True)))
            for key, group in groups
        ]
        return pd.concat(parts, ignore_index=True)[
            [*columns, "metric", "value", "low", "high", "n"]
        ]

    def __repr__(self) -> str:
        lines = [
            f"{r.metric} {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]"
            for r in self.summary().itertuples()
        ]
        how = "generated" if self.metadata.get("generate") else "teacher-forced"
        return f"Evaluation({'; '.join(lines)}; {len(self.table)} prompts, {how})"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same prompts under several conditions: `evaluations` by name, the first the reference."""

    evaluations: dict[str, Evaluation]

    @property
    def table(self) -> pd.DataFrame:
        """One row a condition and metric: `condition, metric, value, low, high, n`."""
        parts = [e.summary().assign(condition=name) for name, e in self.evaluations.items()]
        return pd.concat(parts, ignore_index=True)[
            ["condition", "metric", "value", "low", "high", "n"]
        ]

    @property
    def differences(self) -> pd.DataFrame:
        """Each condition minus the first, paired by prompt; columns as in `table`."""
        (_, first), *others = self.evaluations.items()
        rows = []
        for name, other in others:
            for metric in METRICS:
                before = metric_values(first.table, metric)
                after = metric_values(other.table, metric)
                if before is not None and after is not None:
                    difference = _known(after - before)
                    if not len(difference):
                        continue
                    low, high = _bootstrap(difference)
                    row = {"condition": name, "metric": metric, "value": difference.mean()}
                    rows.append(row | {"low": low, "high": high, "n": len(difference)})
        return pd.DataFrame(rows)

    def plot(self, **options):
        """Dots with intervals, one panel a metric (see `interp.figures.conditions`)."""
        from interp import figures

        return figures.conditions(self.table, **options)

    def __repr__(self) -> str:
        lines = [f"{name}: {evaluation!r}" for name, evaluation in self.evaluations.items()]
        return "\n".join(lines)


def evaluate(
    model: HookedModel,
    prompts: str | Sequence[str] | Dataset,
    *,
    generate: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Accuracy, loss and logit difference of `model` (as it is now, interventions and all).

    Raises `EvaluationError` where some prompts have answers and some have none, where the loss of
    their own tokens is asked for and an intervention makes it meaningless, or the model's numbers
    are not finite.
    """
    prompts = as_prompts(model, prompts)
    about, task = _carried(prompts), describe(prompts)
    has_answers = "answer_ids" in prompts.column_names
    answered = [bool(ids) for ids in prompts["answer_ids"]] if has_answers else [False]
    if any(answered) and not all(answered):
        first = answered.index(False)
        raise EvaluationError(f"prompts: {first} has no answer, and others have one.")
    if generate and not all(answered):
        raise EvaluationError("generate=True: the prompts have no answers to compare with.")
    desc = "evaluate" if progress else None
    if not all(answered):
        check_text_has_a_loss(model, prepared(model, prompts) is not prompts)
        table = _text_losses(model, prompts, batch_size, desc)
    elif generate:
        table = _generated(model, prepared(model, prompts), batch_size, desc)
    else:
        table = _forced(model, prepared(model, prompts), batch_size, desc)
    _check_finite(table, model)
    metadata = {"task": task, "generate": generate, **model.provenance()}
    return Evaluation(pd.concat([about, table], axis=1), metadata)


def compare(
    model: HookedModel,
    prompts: str | Sequence[str] | Dataset,
    conditions: Mapping[str, Any],
    **settings,
) -> Comparison:
    """Evaluate the same prompts under each condition: a name -> intervention, or several, or [].

    The first condition is what the others are compared with. `settings` go to `evaluate`.
    """
    if not conditions:
        raise EvaluationError("conditions: give at least one, such as {'none': []}.")
    prompts = as_prompts(model, prompts)
    found = {}
    for name, interventions in conditions.items():
        with model.intervene(interventions or []):
            found[name] = evaluate(model, prompts, **settings)
    return Comparison(found)


def prepared(model: HookedModel, prompts: Dataset) -> Dataset:
    """The prompts as the applied interventions want them to go in; mostly as they are."""
    if not model.applied:
        return prompts
    spans = spans_of(prompts) or [{}] * len(prompts)
    rows = [dict(row) | {"spans": own} for row, own in zip(prompts, spans, strict=True)]
    changed = [model.prepare(row) for row in rows]
    if all(new is old for new, old in zip(changed, rows, strict=True)):
        return prompts
    about = about_of(prompts.info.description)
    parameters = {**about["parameters"], "prepared_by": list(model.interventions)}
    return from_examples(model, changed, task=about["task"], parameters=parameters)


def check_text_has_a_loss(model: HookedModel, changed: bool = False) -> None:
    """Raises `EvaluationError` where interventions leave a text's own tokens no likelihood.

    `changed`: whether one of them put another text in its place.
    """
    acausal = [one for one in model.applied if not getattr(one, "causal", True)]
    if acausal or changed:
        who = repr(acausal[0]) if acausal else "what is applied"
        why = "what is read at a token depends on later ones" if acausal else "it changes prompts"
        raise EvaluationError(
            "prompts: without answers the loss is that of their own tokens, which has no meaning "
            f"under {who}: {why}. Give prompts with answers."
        )


def metric_values(table: pd.DataFrame, metric: str) -> Float[np.ndarray, " prompt"] | None:
    """Each prompt's value of a metric; None where it was not measured."""
    column = {"accuracy": "correct"}.get(metric, metric)
    return table[column].to_numpy(float) if column in table else None


def _known(values: Float[np.ndarray, " prompt"] | None) -> Float[np.ndarray, " known"]:
    """Without the prompts that say nothing (NaN)."""
    return np.empty(0) if values is None else values[~np.isnan(values)]


def answer_rows(
    answers: Sequence[Sequence[int]], device
) -> tuple[Int[Tensor, "batch answer"], Tensor]:
    """Answers padded on the left to one width, and which entries are real."""
    width = max(len(answer) for answer in answers)
    padded = [[0] * (width - len(a)) + list(a) for a in answers]
    real = [[False] * (width - len(a)) + [True] * len(a) for a in answers]
    return torch.tensor(padded, device=device), torch.tensor(real, device=device)


def written_by(model: HookedModel, new: Int[Tensor, "batch new"]) -> Bool[Tensor, "batch new"]:
    """Which generated tokens come before an end-of-sequence token; what follows is filling."""
    ends = model.original_model.generation_config.eos_token_id
    ends = torch.tensor([-1] if ends is None else ends, device=new.device)
    return torch.isin(new, ends).cumsum(1) == 0


def forced_logits(
    model: HookedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    spans: Sequence[Spans] | None = None,
    lengths: Sequence[int] | None = None,
    images: Sequence[Any] | None = None,
    batch_size: int = 8,
    desc: str | None = None,
) -> Iterator["Forced"]:
    """Logits that predict the tokens of answers, each read in one pass behind its prompt.

    `lengths`: how many of a row's tokens interventions shall take for the prompt; default: those of
    the prompt, so that the answer's count as generated. `images`: see `HookedModel.batches`.
    """
    # the last answer token predicts nothing that is asked for
    lists = [[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
    lengths = [len(p) for p in prompts] if lengths is None else lengths
    for batch in model.batches(lists, batch_size, desc, images=images):
        rows = batch.index.tolist()
        target, real = answer_rows([answers[i] for i in rows], batch.input_ids.device)
        told = None if spans is None else [spans[i] for i in rows]
        with model.spans(told, [lengths[i] for i in rows]):
            logits = model.last_logits(
                batch.input_ids, batch.attention_mask, target.shape[1], **batch.inputs
            )
        yield Forced(rows, logits, target, real)


@dataclass(frozen=True, eq=False)
class Forced:
    """Of some rows, what the model says of their answers, which are padded on the left."""

    rows: list[int]
    logits: Float[Tensor, "batch answer vocab"]
    target: Int[Tensor, "batch answer"]
    real: Bool[Tensor, "batch answer"]

    @property
    def losses(self) -> Float[Tensor, "batch answer"]:
        """Negative log-likelihood of each token, nats; 0 where there is none."""
        return torch.where(self.real, token_losses(self.logits, self.target), 0)

    @property
    def greedy(self) -> Bool[Tensor, " batch"]:
        """Whether all of an answer's tokens are the argmax."""
        return ((self.logits.argmax(-1) == self.target) | ~self.real).all(1)


def token_losses(
    logits: Float[Tensor, "batch pos vocab"], target: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Negative log-likelihood of each token, nats."""
    # row by row: over transposed logits torch's sum of a large vocabulary is off by 1e-4
    rows = zip(logits, target, strict=True)
    return torch.stack([cross_entropy(row, wanted, reduction="none") for row, wanted in rows])


def _forced(model, prompts, batch_size, desc) -> pd.DataFrame:
    choices = _first_choice_tokens(model, prompts)
    rows: dict[int, dict] = {}
    for found in forced_logits(
        model,
        prompts["input_ids"],
        prompts["answer_ids"],
        spans=spans_of(prompts),
        images=images_of(prompts),
        batch_size=batch_size,
        desc=desc,
    ):
        loss = (found.losses.sum(1) / found.real.sum(1)).tolist()
        correct, first = found.greedy.tolist(), found.real.int().argmax(1).tolist()
        for row, i in enumerate(found.rows):
            rows[i] = {"correct": correct[row], "loss": loss[row]}
            if choices is not None:
                rows[i]["logit_diff"] = _logit_diff(found.logits[row, first[row]], *choices[i])
    return pd.DataFrame([rows[i] for i in range(len(prompts))])


def _generated(model, prompts, batch_size, desc) -> pd.DataFrame:
    answers = prompts["answer_ids"]
    rows: dict[int, dict] = {}
    for batch in model.batches(prompts["input_ids"], batch_size, desc, images=images_of(prompts)):
        index = batch.index.tolist()
        longest = max(len(answers[i]) for i in index)
        with _told(model, prompts, index):
            new = model.continue_greedily(
                batch.input_ids, batch.attention_mask, longest, **batch.inputs
            )
        for row, i in enumerate(index):
            written = new[row, : len(answers[i])].tolist()
            told = new[row][written_by(model, new)[row]]
            text = model.tokenizer.decode(told, skip_special_tokens=True)
            rows[i] = {"correct": written == list(answers[i]), "generated": text}
    return pd.DataFrame([rows[i] for i in range(len(prompts))])


def _text_losses(model, prompts, batch_size, desc) -> pd.DataFrame:
    short = [n for n, ids in enumerate(prompts["input_ids"]) if len(ids) < 2]
    if short:
        raise EvaluationError(
            f"prompts: prompt {short[0]} has one token, and a loss needs two; give a longer text."
        )
    losses: dict[int, float] = {}
    for batch in model.batches(prompts["input_ids"], batch_size, desc, images=images_of(prompts)):
        ids, mask = batch.input_ids, batch.attention_mask
        with _told(model, prompts, batch.index.tolist()):
            logits = model.last_logits(ids, mask, ids.shape[1], **batch.inputs)[:, :-1]
        loss = token_losses(logits, ids[:, 1:])
        # a token is predicted from a real one; that of an image is not written but put there
        told = mask[:, :-1].bool() & ~of_images(model, ids)[:, 1:]
        mean = torch.where(told, loss, 0).sum(1) / told.sum(1)
        losses |= dict(zip(batch.index.tolist(), mean.tolist(), strict=True))
    return pd.DataFrame({"loss": [losses[i] for i in range(len(prompts))]})


def _carried(prompts: Dataset) -> pd.DataFrame:
    """The columns that a result keeps."""
    left = ("text", "input_ids", "answer_ids", "spans", "image")
    kept = [name for name in prompts.column_names if name not in left]
    table = prompts.select_columns(kept).to_pandas()
    assert isinstance(table, pd.DataFrame)  # it comes in pieces only if asked to
    return table


def _told(model: HookedModel, prompts: Dataset, index: list[int]):
    """Interventions may ask where spans lie, and which tokens are the prompt's."""
    rows = prompts.select(index)
    return model.spans(spans_of(rows), [len(ids) for ids in rows["input_ids"]])


def _first_choice_tokens(model, prompts) -> list[tuple[int, list[int]]] | None:
    """For each prompt the first token of the right choice and of the wrong ones."""
    if "choices" not in prompts.column_names:
        return None
    found = []
    for row in prompts:
        firsts = {c: token_after(model, row, c) for c in row["choices"]}
        right = row["answer_ids"][0]
        found.append((right, sorted({t for t in firsts.values() if t != right})))
    return found


def token_after(model, row: dict, choice: str) -> int:
    """The token that would follow the prompt if `choice` did."""
    prompt = row["input_ids"]
    for special in (True, False):  # a chat's text has its special tokens already
        ids = model.tokenizer(row["text"] + choice, add_special_tokens=special).input_ids
        ids = written_out(row, ids)
        if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
            return ids[len(prompt)]
    raise EvaluationError(
        f"choices: {choice!r} does not follow {row['text'][-20:]!r} as a token of its own; begin "
        "the choices with the space."
    )


def _logit_diff(logits: Tensor, right: int, wrong: list[int]) -> float:
    return float(logits[right] - logits[wrong].max()) if wrong else float("nan")


def _check_finite(table: pd.DataFrame, model: HookedModel) -> None:
    if "loss" in table and not np.isfinite(table["loss"]).all():
        first = int((~np.isfinite(table["loss"])).to_numpy().argmax())
        raise EvaluationError(
            f"prompts: the loss on prompt {first} is {table['loss'][first]}; the activations of "
            f"{model.name} are not finite there (dtype {model.original_model.dtype})."
        )


def share_interval(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of `right` out of `n`."""
    found = binomtest(right, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _interval(metric: str, values: np.ndarray) -> tuple[float, float]:
    if metric == "accuracy":
        return share_interval(int(values.sum()), len(values))
    return _bootstrap(values)


def _bootstrap(values: Float[np.ndarray, " prompt"]) -> tuple[float, float]:
    """95 % percentile interval of the mean; a single prompt, or no spread, has none."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)
