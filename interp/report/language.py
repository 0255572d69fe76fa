"""The report's sections on language: sinks, needles, retrieval heads, their ablation, circuits."""

from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import pandas as pd
from datasets import Dataset

from interp.analysis.causality import AblationControl, ablation_control, conditions_of
from interp.analysis.patterns import attention
from interp.analysis.retrieval import retrieval_heads
from interp.analysis.sinks import SinkRule, attention_sinks
from interp.evaluation import Evaluation
from interp.heads import HeadScores, ScoresError
from interp.model.hooked import HookedModel
from interp.report.ablation import ablation_section
from interp.report.circuits import circuits_section, find_circuits
from interp.report.page import Section
from interp.report.plan import Plan, Texts, heads_to_ablate
from interp.report.retrieval import (
    FEW,
    answered_by,
    heads_section,
    needles_section,
    pattern_parts,
)
from interp.report.sinks import sinks_section
from interp.report.stages import Part, Stages
from interp.tasks.prompts import describe

LANGUAGE = ("sinks", "retrieval", "ablation", "circuits")


def language(model: HookedModel, plan: Plan, texts: Texts, stages: Stages) -> Part:
    """All that a report says of a model that reads text."""
    options = {"batch_size": plan.batch_size, **stages.options}
    out = stages.begin("sinks", "attention sinks on plain texts")
    # a column that few queries see is mostly chance
    rule = SinkRule(min_queries=max(1, min(map(len, texts.prompts["input_ids"])) // 4))
    sinks = attention_sinks(model, texts.prompts, rule=rule, out=out, **options)
    lengths = ", ".join(map(str, plan.lengths or ()))
    out = stages.begin("retrieval", f"{plan.n} needle prompts of {lengths} tokens")
    needles = plan.needles(model)
    scores, answered = scored(model, needles, out, options)
    ks = heads_to_ablate(scores, plan)
    out = stages.begin("ablation", f"top {max(ks)} heads against {plan.draws} random draws")
    result, note = ablated(model, scores, ks, plan, texts, out, options)
    out = stages.begin("circuits", f"heads that carry a task, {plan.n_pairs} pairs of each")
    circuits = find_circuits(model, plan, out, **stages.options)
    shown = shown_pattern(model, scores, needles, answered)
    sections: list[Section] = [
        sinks_section(sinks, texts.kinds),
        needles_section(evaluation_of(needles, answered)),
        heads_section(scores, needles, scores.top(max(ks)), shown),
        ablation_section(result, note),
        *([circuits_section(circuits)] if circuits else []),
    ]
    prompts = {"texts": describe(texts.prompts), "needles": describe(needles)}
    prompts["held out"] = result.metadata["task"]
    counts = {"ablated": [str(head) for head in result.heads(max(ks))]}
    return Part(sections, prompts, counts | {"retrieval": scores.metadata["counts"]})


def scored(
    model: HookedModel, needles: Dataset, out: Path, options: dict[str, Any]
) -> tuple[HeadScores, np.ndarray]:
    """Head scores, and which needles were answered.

    Where the model answers too few, the heads are scored on all prompts (from the same shards).
    """
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # that none is answered, the page says
        scores = retrieval_heads(model, needles, out=out, **options)
    answered = answered_by(scores)
    if answered.sum() < FEW:
        again = options | {"out": out, "resume": True, "progress": False}
        scores = retrieval_heads(model, needles, only_successes=False, **again)
    return scores, answered


def ablated(
    model: HookedModel,
    scores: HeadScores,
    ks: tuple[int, ...],
    plan: Plan,
    texts: Texts,
    out: Path,
    options: dict[str, Any],
) -> tuple[AblationControl, str]:
    """The ablation and its control; random heads from the same layers if these have enough."""
    match, note = "layer", ""
    try:
        conditions_of(scores, ks, plan.draws, match, plan.seed)
    except ScoresError:
        match = None
        note = " (A layer holds too many of the top heads to draw as many others from it.)"
    settings = {"ks": ks, "draws": plan.draws, "match": match, "how": plan.how, "seed": plan.seed}
    settings |= {"other": texts.control, "out": out, **options}
    return ablation_control(model, scores, plan.held_out(model), **settings), note


def evaluation_of(needles: Dataset, answered: np.ndarray) -> Evaluation:
    """The scoring run's own answers as an evaluation: no prompt is run twice."""
    table = needles.select_columns(["length", "depth"]).to_pandas()
    assert isinstance(table, pd.DataFrame)
    return Evaluation(table.assign(correct=answered), {"generate": False})


def shown_pattern(
    model: HookedModel, scores: HeadScores, needles: Dataset, answered: np.ndarray
) -> list:
    """The best head on one short prompt, an answered one if there is any; prompt and answer."""
    sizes = [len(ids) for ids in needles["input_ids"]]
    prompt = min(range(len(sizes)), key=lambda i: (not answered[i], sizes[i], i))
    row = needles[prompt]
    with_answer = {
        "text": row["text"] + row["answer"],
        "input_ids": [*row["input_ids"], *row["answer_ids"][:-1]],
        "spans": row["spans"],
    }
    patterns = attention(model, [with_answer], heads=scores.top(1))
    return pattern_parts(patterns, row, bool(answered[prompt]))
