"""The report: sinks, needles, retrieval heads and their ablation, circuits, on one page.

With interventions also what they change, task by task.

    from interp import report
    report.write(model, "report/")

Every stage keeps its results in a folder of its own, so a report that was killed goes on.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from interp.intervention.base import interventions_of
from interp.model.hooked import HookedModel
from interp.provenance import versions
from interp.report.ablation import ablation_section
from interp.report.before_after import before_after_section, compare_tasks
from interp.report.circuits import circuits_section, find_circuits
from interp.report.page import write_page
from interp.report.plan import Plan, Texts, heads_to_ablate
from interp.report.retrieval import (
    FEW,
    answered_by,
    heads_section,
    needles_section,
    pattern_parts,
)
from interp.report.sinks import sinks_section
from interp.runs import Run
from interp.tasks.prompts import describe

__all__ = ["Plan", "write"]

PAGE = "report.html"
STAGES = ("sinks", "retrieval", "ablation", "circuits", "before and after", "page")


def write(
    model: HookedModel,
    out: str | Path,
    plan: Plan | None = None,
    *,
    interventions: Any = None,
    overwrite: bool = False,
    progress: bool = True,
    command: str = "",
) -> Path:
    """Measure what `plan` says and write `out/report.html`; returns its path.

    Beside it: `figures/NAME.parquet` for every figure and table, `run.json`, and the folders of the
    stages, from which a killed report continues. `interventions` (or folders of them) are compared
    with the model without; all other sections are of the model as it is. `command` is noted as how
    to get it again.

    Raises:
        RunError: `out` cannot be written, or holds a report of another model or plan.
        NeedleError: The needle task does not fit in the model's context window.
        InterventionError: One that can't be read, or was made on another kind of model.
    """
    began = time.monotonic()
    plan, edits = (plan or Plan()).fitted(model), interventions_of(interventions)
    settings = {"analysis": "report", "plan": asdict(plan), **model.provenance()}
    if edits:
        with model.intervene(*edits):  # what does not fit this model is told now
            settings["compared with"] = list(model.interventions)
    run = Run.open(out, settings, resume=not overwrite)
    tell = teller(progress, [s for s in STAGES if edits or s != "before and after"])
    stage = {"resume": not overwrite, "progress": progress}

    tell("sinks", "attention sinks on plain texts")
    texts = Texts.of(model, plan)
    # a column that few queries see is mostly chance
    rule = SinkRule(min_queries=max(1, min(map(len, texts.prompts["input_ids"])) // 4))
    sinks = attention_sinks(
        model,
        texts.prompts,
        rule=rule,
        batch_size=plan.batch_size,
        out=run.folder / "sinks",
        **stage,
    )
    lengths = ", ".join(map(str, plan.lengths or ()))
    tell("retrieval", f"{plan.n} needle prompts of {lengths} tokens")
    needles = plan.needles(model)
    scores, answered = scored(model, needles, plan, run.folder / "retrieval", stage)
    ks = heads_to_ablate(scores, plan)
    tell("ablation", f"top {max(ks)} heads against {plan.draws} random draws")
    result, note = ablated(model, scores, ks, plan, texts, run.folder / "ablation", stage)
    tell("circuits", f"heads that carry a task, {plan.n_pairs} pairs of each")
    circuits = find_circuits(model, plan, run.folder / "circuits", **stage)
    changes = {}
    if edits:
        tell("before and after", "each task without the intervention and with it")
        changes = compare_tasks(model, edits, plan, texts, run.folder / "before-after", **stage)
    tell("page", "writing")

    sections = [
        sinks_section(sinks, texts.kinds),
        needles_section(evaluation_of(needles, answered)),
        heads_section(
            scores, needles, scores.top(max(ks)), shown_pattern(model, scores, needles, answered)
        ),
        ablation_section(result, note),
        *([circuits_section(circuits)] if circuits else []),
        *([before_after_section(changes, edits)] if edits else []),
    ]
    record = run.finish(
        seconds=round(time.monotonic() - began),
        command=command,
        ablated=[str(head) for head in result.heads(max(ks))],
        retrieval=scores.metadata["counts"],
        headlines={section.name: section.headline for section in sections},
        prompts={
            "texts": describe(texts.prompts),
            "needles": describe(needles),
            "held out": result.metadata["task"],
        },
    )
    title = f"Attention heads of {Path(model.name).name}"
    return write_page(run.folder / PAGE, title, sections, about(model, plan, record))


def teller(progress: bool, stages: Sequence[str]) -> Callable[[str, str], None]:
    """Says on stderr which of the stages begins."""

    def tell(stage: str, what: str) -> None:
        if progress:
            at = f"[{stages.index(stage) + 1}/{len(stages)}]"
            print(f"{at} {stage}: {what}", file=sys.stderr, flush=True)

    return tell


def scored(
    model: HookedModel, needles: Dataset, plan: Plan, out: Path, stage: dict[str, Any]
) -> tuple[HeadScores, np.ndarray]:
    """Head scores, and which needles were answered.

    Where the model answers too few, the heads are scored on all prompts (from the same shards).
    """
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # that none is answered, the page says
        scores = retrieval_heads(model, needles, batch_size=plan.batch_size, out=out, **stage)
    answered = answered_by(scores)
    if answered.sum() < FEW:
        again = {"batch_size": plan.batch_size, "out": out, "progress": False}
        scores = retrieval_heads(model, needles, only_successes=False, **again)
    return scores, answered


def ablated(
    model: HookedModel,
    scores: HeadScores,
    ks: tuple[int, ...],
    plan: Plan,
    texts: Texts,
    out: Path,
    stage: dict[str, Any],
) -> tuple[AblationControl, str]:
    """The ablation and its control; random heads from the same layers if these have enough."""
    match, note = "layer", ""
    try:
        conditions_of(scores, ks, plan.draws, match, plan.seed)
    except ScoresError:
        match = None
        note = " (A layer holds too many of the top heads to draw as many others from it.)"
    settings = {"ks": ks, "draws": plan.draws, "match": match, "how": plan.how, "seed": plan.seed}
    settings |= {"other": texts.control, "batch_size": plan.batch_size, "out": out}
    return ablation_control(model, scores, plan.held_out(model), **settings, **stage), note


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


def about(model: HookedModel, plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """The provenance of the page."""
    settings, counts = record["settings"], record["counts"]
    packages = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    sessions = record["resumed"]["sessions"]
    hashes = "; ".join(f"{name} {task['sha256'][:16]}" for name, task in counts["prompts"].items())
    tokens = counts["prompts"]["texts"]["tokens"]
    rows = {
        "model": settings["model"],
        "revision": settings["revision"] or "–",
        "architecture": f"{settings['architecture']}, {len(model.attention_layers)} layers x "
        f"{model.cfg.n_heads} heads, window of {model.cfg.n_ctx} tokens",
        "precision, device": f"{settings['dtype']}, {settings['device']} "
        f"({settings['attention']} attention)",
        "tokens": f"{tokens['tokenizer']}; put before a text: "
        f"{' '.join(tokens['before']) or 'nothing'}; chat template: "
        f"{'yes' if tokens['chat'] else 'no'}",
        "needle prompts": f"{plan.n} to score heads (seed {plan.seed}), {plan.n_ablation} others "
        f"to ablate them (seed {plan.seed + 1}); lengths {', '.join(map(str, plan.lengths or ()))}",
        "haystack, texts": plan.data or "our own",
        "ablation": f"{plan.how}; {len(counts['ablated'])} heads: {' '.join(counts['ablated'])}",
        "SHA-256 of prompts": hashes,
        "versions": packages,
        "finished": f"{record['finished']}, {counts['seconds']} s"
        + (f" (session {sessions}: results of earlier ones were kept)" if sessions > 1 else ""),
        "command": counts["command"] or "interp.report.write(...)",
    }
    subtitle = (
        f"{rows['architecture']} · {settings['dtype']} · {record['finished'][:10]} · "
        f"interp {settings['versions']['interp']}"
    )
    text = json.dumps(record, indent=2, ensure_ascii=False)
    return {"rows": rows, "subtitle": subtitle, "versions": versions(), "json": text}
