"""Retrieval heads: which heads copy the answer out of a long text.

While the answer y_1 ... y_m is produced, row t is the query that predicts y_t (row 1 belongs to the
last prompt token) and j_t the key that a head attends to most there. The head *copies* at t when

    s <= j_t < e   and   x[j_t] = y_t          (the answer stands at x[s:e] in the text)

Its score on one prompt, three ways (`form`):

- "count": copying rows / (e - s), as the authors' code has it; a repeated token counts again, so
  it can exceed 1.
- "set": distinct tokens copied / distinct tokens in x[s:e], as the paper has it.
- "positions": distinct source positions copied / (e - s); at most 1.

The head's score is the mean over prompts that the model answers (success filter). `how="forced"`
reads all rows in one pass over prompt and reference answer, and takes a prompt as answered when
each answer token is the argmax; `how="generate"` lets the model write greedily, looks only at the
last row of each step, and takes it as answered when ROUGE-1 recall of the answer is above 0.5.

Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv
2404.15574) and its code. Differences: exact spans instead of an approximate search, failed prompts
are counted, generation ends at the end-of-sequence token or after `max_new_tokens`. Literal
copying only: an induction head that copies the answer scores too, one that retrieves by meaning
does not.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args
from warnings import catch_warnings, simplefilter, warn

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from interp.analysis.shards import in_shards
from interp.errors import UserError
from interp.evaluation import answer_rows, written_by
from interp.heads import HeadScores
from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from interp.tasks.prompts import SpanError, as_prompts, describe

Form = Literal["count", "set", "positions"]
How = Literal["forced", "generate"]
FORMS = get_args(Form)
MEASURES = (*FORMS, "mass")


class RetrievalError(UserError):
    """Retrieval scores that can't be computed as asked."""


def retrieval_heads(
    model: HookedModel,
    prompts,
    *,
    form: Form = "count",
    how: How = "forced",
    span: str = "answer",
    only_successes: bool = True,
    max_new_tokens: int = 16,
    batch_size: int = 4,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> HeadScores:
    """Score every head by how much of the answer it copies from the span `span` of each prompt.

    Args:
        prompts: Needle prompts (`interp.tasks.needle`), or any with answers and that span.
        form: Which of the three definitions becomes `score`; the table has all of them.
        how: One pass over the reference answer, or greedy generation with the KV cache.
        only_successes: Leave out prompts that the model does not answer (their samples are NaN).
        out: Folder to keep shards in: a killed run continues there and ends with the same table.

    Returns:
        `HeadScores` with the samples kept; columns beside `score`: the forms, `frequency` (share of
        prompts with a score above 0) and `mass` (mean weight of the answer's rows on the span).
        `metadata["counts"]` says how many prompts were attempted and answered.

    Raises:
        RetrievalError: Unknown `form` or `how`.
        SpanError: A prompt without the span, or without an answer.
    """
    _check(form, FORMS, "form")
    _check(how, get_args(How), "how")
    prompts = as_prompts(model, prompts)
    _check_spans(prompts, span)
    settings = {
        "analysis": "retrieval_heads",
        "how": how,
        "span": span,
        "max_new_tokens": max_new_tokens if how == "generate" else None,
        "task": describe(prompts),
        **model.provenance(),
    }

    def score(rows: Dataset) -> pd.DataFrame:
        if how == "forced":
            return _forced(model, rows, span)
        return _generated(model, rows, span, max_new_tokens)

    desc = "retrieval heads" if progress else None
    table = in_shards(score, prompts, batch_size, settings, out, resume, desc)
    scores = _summarise(table, model.attention_layers, form, only_successes, settings)
    if out is not None:
        scores.save(Path(out) / "heads.parquet")
    return scores


def copied(
    top: Int[Tensor, "batch layer head row"],
    tokens: Int[Tensor, "batch key"],
    emitted: Int[Tensor, "batch row"],
    real: Bool[Tensor, "batch row"],
    span: Int[Tensor, "batch 2"],
) -> Bool[Tensor, "batch layer head row"]:
    """Does the head's most-attended key lie in `span` and hold the token that is emitted?"""
    flat = top.flatten(1)
    held = tokens.gather(1, flat).view_as(top)
    start, end = span[:, 0, None, None, None], span[:, 1, None, None, None]
    inside = (start <= top) & (top < end)
    return inside & (held == emitted[:, None, None]) & real[:, None, None]


def forms_of(
    hits: Bool[Tensor, "batch layer head row"],
    top: Int[Tensor, "batch layer head row"],
    tokens: Int[Tensor, "batch key"],
    span: Int[Tensor, "batch 2"],
) -> dict[str, Float[Tensor, "batch layer head"]]:
    """The three scores of each head on each prompt, from where it looked and which rows copied."""
    found = {form: [] for form in FORMS}
    for row, (start, end) in enumerate(span.tolist()):  # spans differ in length
        source = tokens[row, start:end]
        reached = hits[row][..., None] & (top[row][..., None] == torch.arange(start, end))
        positions = reached.any(-2)
        kinds = source == source.unique()[:, None]
        found["count"].append(hits[row].sum(-1) / (end - start))
        found["positions"].append(positions.float().mean(-1))
        found["set"].append((positions[..., None, :] & kinds).any(-1).float().mean(-1))
    return {form: torch.stack(values) for form, values in found.items()}


@torch.no_grad()
def _forced(model: HookedModel, prompts: Dataset, span: str) -> pd.DataFrame:
    """All rows of a batch in one pass over prompts and reference answers."""
    answers = prompts["answer_ids"]
    texts = [[*p, *a] for p, a in zip(prompts["input_ids"], answers, strict=True)]
    batch = model.batch([tokens[:-1] for tokens in texts])  # the last one predicts nothing asked
    target, real = answer_rows(answers, batch.input_ids.device)
    look = Look(prompts, span, slice(-target.shape[1], None))
    with model.hooks(fwd_hooks=look.hooks(model)):
        logits = model.last_logits(batch.input_ids, batch.attention_mask, target.shape[1])
    success = ((logits.argmax(-1) == target) | ~real).all(1)
    return look.table(texts, target, real).assign(success=success.tolist())


@torch.no_grad()
def _generated(model: HookedModel, prompts: Dataset, span: str, limit: int) -> pd.DataFrame:
    """Greedy generation with the KV cache; of each pass only the last row is looked at."""
    batch = model.batch(prompts["input_ids"])
    look = Look(prompts, span, slice(-1, None))
    with model.hooks(fwd_hooks=look.hooks(model)):
        emitted = model.continue_greedily(batch.input_ids, batch.attention_mask, limit)
    going = written_by(model, emitted)
    told = [tokens[own].tolist() for tokens, own in zip(emitted, going, strict=True)]
    written = model.tokenizer.batch_decode(told, skip_special_tokens=True)
    success = [_recall(a, w) > 0.5 for a, w in zip(prompts["answer"], written, strict=True)]
    texts = [[*p, *e] for p, e in zip(prompts["input_ids"], emitted.tolist(), strict=True)]
    return look.table(texts, emitted, going).assign(success=success, generated=written)


class Look:
    """What every head looks at in chosen rows, layer by layer and pass by pass.

    Keys are counted by position in their own prompt, so padding and sliding windows are no matter.
    """

    def __init__(self, prompts: Dataset, span: str, rows: slice):
        self.spans = torch.tensor([row[span] for row in prompts["spans"]])
        self.rows = rows
        self.top: dict[int, list[Tensor]] = defaultdict(list)
        self.mass: dict[int, list[Tensor]] = defaultdict(list)

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable]]:
        """One read-only hook a layer."""
        return [
            (f"blocks.{layer}.attn.hook_attention", partial(self._look, layer))
            for layer in model.attention_layers
        ]

    def _look(self, layer: int, attention: Attention, hook) -> None:
        spans, positions = self.spans.to(attention.q.device), attention.key_positions
        inside = (spans[:, :1] <= positions) & (positions < spans[:, 1:]) & attention.real_keys
        pattern = attention.pattern(queries=self.rows)  # a few rows: those that emit
        held = positions[:, None, None].expand_as(pattern).gather(-1, pattern.argmax(-1)[..., None])
        self.top[layer].append(held.squeeze(-1).cpu())
        self.mass[layer].append((pattern * inside[:, None, None]).sum(-1).cpu())

    def table(self, texts: list[list[int]], emitted: Tensor, real: Tensor) -> pd.DataFrame:
        """One row a prompt: each measure of every head, `[layer head]` in one list."""
        n_rows = emitted.shape[1]
        top, mass = (
            torch.stack([torch.cat(found[layer], dim=2) for layer in sorted(found)], dim=1)
            for found in (self.top, self.mass)
        )  # generation ends with a token that no pass has seen
        top, mass = top[..., :n_rows], mass[..., :n_rows]
        emitted, real = emitted.cpu(), real.cpu()
        width = max(map(len, texts))
        tokens = torch.tensor([[*text, *[-1] * (width - len(text))] for text in texts])
        hits = copied(top, tokens, emitted, real, self.spans)
        measures = forms_of(hits, top, tokens, self.spans)
        measures["mass"] = (mass * real[:, None, None]).sum(-1) / real.sum(-1)[:, None, None]
        return pd.DataFrame({name: value.flatten(1).tolist() for name, value in measures.items()})


def _summarise(
    table: pd.DataFrame, layers: list[int], form: Form, only_successes: bool, settings: dict
) -> HeadScores:
    success = table["success"].to_numpy(bool)
    kept = success if only_successes else np.ones_like(success)
    if not kept.any():
        warn(
            f"retrieval_heads: none of {len(table)} prompts was answered, so no head has a score; "
            "give shorter prompts, or only_successes=False.",
            stacklevel=3,
        )
    shape = (len(table), len(layers), -1)
    samples = {name: np.stack(table[name].to_list()).reshape(shape) for name in MEASURES}
    for values in samples.values():
        values[~kept] = np.nan
    counts = {"attempted": len(table), "answered": int(success.sum()), "scored": int(kept.sum())}
    scores = HeadScores.from_samples(
        samples[form],
        layers=layers,
        keep_samples=True,
        **settings | {"form": form, "only_successes": only_successes, "counts": counts},
    )
    found = scores.table.assign(
        **{name: _mean(values) for name, values in samples.items()},
        frequency=np.where(kept.any(), _mean((samples[form] > 0)[kept]), np.nan),
    )
    return HeadScores(found, scores.metadata, samples=scores.samples)


def _mean(samples: Shaped[np.ndarray, "prompt layer head"]) -> Float[np.ndarray, " row"]:
    with np.errstate(invalid="ignore"), catch_warnings():
        simplefilter("ignore", RuntimeWarning)  # no prompt answered: all NaN
        return np.nanmean(samples, axis=0).reshape(-1)


def _recall(answer: str, written: str) -> float:
    """ROUGE-1 recall of the answer's words in what was written, stemmed."""
    return _rouge().score(answer, written)["rouge1"].recall


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)


def _check(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise RetrievalError(f"{name}={value!r}: one of {', '.join(allowed)}.")


def _check_spans(prompts: Dataset, span: str) -> None:
    for n, row in enumerate(prompts):
        if not row.get("answer_ids"):
            raise SpanError(f"prompts: prompt {n} has no answer to retrieve.")
        spans = {name: place for name, place in (row.get("spans") or {}).items() if place}
        if span not in spans:
            has = ", ".join(spans) or "none"
            raise SpanError(f"span={span!r}: prompt {n} has no such span; it has {has}.")
        (start, end), size = spans[span], len(row["input_ids"])
        if not 0 <= start < end <= size:
            raise SpanError(f"span={span!r}: prompt {n} has {size} tokens, not [{start}, {end}).")
