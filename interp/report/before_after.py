"""The report's section on an intervention: each task without it and with it, paired by prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from interp import figures, tasks
from interp.errors import UserError
from interp.evaluation import METRICS, Comparison, Evaluation, compare
from interp.model.hooked import HookedModel
from interp.model.images import reads_images
from interp.report.page import Figure, Section, Table
from interp.report.plan import Plan, Texts
from interp.report.stages import Part, Stages
from interp.report.words import change, interval, listed, number, percent
from interp.runs import Run
from interp.tasks.prompts import PromptError, describe

WITHOUT, WITH = "without", "with"
NAMES = {"accuracy": "accuracy", "loss": "loss", "logit_diff": "logit difference"}

Found = Comparison | str
"""What came of one task: a comparison, or why there is none."""


def before_after(
    model: HookedModel, edits: Sequence[Any], plan: Plan, texts: Texts | None, stages: Stages
) -> Part:
    """What interventions change; `texts` is None where the model reads none."""
    out = stages.begin("before and after", "each task without the intervention and with it")
    found = compare_tasks(model, edits, plan, texts, out, **stages.options)
    return Part([before_after_section(found, edits)])


def compare_tasks(
    model: HookedModel,
    edits: Sequence[Any],
    plan: Plan,
    texts: Texts | None,
    out: Path,
    *,
    resume: bool,
    progress: bool,
) -> dict[str, Found]:
    """Every task that the model's tokens allow, by name; kept in `out`, a shard a task."""
    prompts = prompts_of(model, plan, texts)
    names = list(prompts)
    with model.intervene(*edits):
        settings = {"analysis": "before and after", **model.provenance()}
    settings["tasks"] = {name: describe(prompts[name]) for name in names}
    run = Run.open(out, settings, resume=resume)
    for index, _ in run.shards(len(names), size=1):
        table, reason = measured(model, prompts[names[index]], edits, plan.batch_size, progress)
        run.save_shard(index, table, {"reason": reason})
    run.finish(tasks=names)
    return {name: found_in(table) for name, table in zip(names, run.tables(), strict=True)}


def prompts_of(model: HookedModel, plan: Plan, texts: Texts | None) -> dict[str, Dataset]:
    """Held-out needles, the pairs' clean prompts (other ones than circuits are found on), texts;
    questions about pictures, others than the section on vision has."""
    found = {}
    if texts is not None:
        found["needles"] = plan.held_out(model)
        pairs = {"indirect objects": tasks.ioi, "coloured objects": tasks.colored_objects}
        for name, make in pairs.items() if plan.n_pairs else ():
            try:
                found[name] = make(model, n=plan.n_pairs, seed=plan.seed + 1)
            except PromptError:
                continue  # its words are no single tokens: the section on circuits says so
        found["plain texts"] = texts.control
    if plan.n_scenes and reads_images(model):
        found["questions about pictures"] = plan.questions(model)
    return found


def measured(
    model: HookedModel, prompts: Dataset, edits: Sequence[Any], batch_size: int, progress: bool
) -> tuple[pd.DataFrame, str]:
    """Every prompt's numbers under both conditions; or none, and why."""
    conditions = {WITHOUT: [], WITH: list(edits)}
    try:
        found = compare(model, prompts, conditions, batch_size=batch_size, progress=progress)
    except UserError as error:
        return pd.DataFrame({"condition": []}), str(error)
    columns = ["correct", *METRICS]
    parts = [e.table.filter(columns).assign(condition=c) for c, e in found.evaluations.items()]
    return pd.concat(parts, ignore_index=True), ""


def found_in(table: pd.DataFrame) -> Found:
    """A shard as what came of its task."""
    if table.attrs["reason"]:
        return table.attrs["reason"]
    rows = {name: table[table["condition"] == name] for name in (WITHOUT, WITH)}
    return Comparison({n: Evaluation(t.reset_index(drop=True), {}) for n, t in rows.items()})


def before_after_section(found: Mapping[str, Found], edits: Sequence[Any]) -> Section:
    """What was applied, what it changed, and the numbers."""
    compared = {name: one for name, one in found.items() if isinstance(one, Comparison)}
    parts: list[str | Figure | Table] = [set_up(edits)]
    parts += [f"Not on {name}: {one}" for name, one in found.items() if isinstance(one, str)]
    if compared:
        parts += [differences_table(compared), figure(compared)]
    return Section("before-after", "What does the intervention change?", headline(compared), parts)


def set_up(edits: Sequence[Any]) -> str:
    """What was done."""
    what = "; then ".join(map(repr, edits))
    return (
        f"Applied: {what}. The same prompts went through the model without it and with it, and "
        "differences are paired by prompt. Needles and pairs of prompts are other ones than those "
        "that the sections above choose heads on; whether the intervention itself was made on some "
        "of them, the report cannot know."
    )


def headline(compared: Mapping[str, Comparison]) -> str:
    """What changed beyond its interval, and on which tasks nothing did."""
    changed, same = [], []
    for name, one in compared.items():
        row = deciding(one)
        if row["low"] > 0 or row["high"] < 0:
            changed.append(f"{NAMES[row['metric']]} on {name} {moved(one, row['metric'])}")
        else:
            same.append(name)
    if same:
        changed.append(f"no measurable change on {listed(same)}")
    if not changed:
        return "The intervention could be measured on no task."
    return f"With the intervention: {'; '.join(changed)}."


def deciding(comparison: Comparison) -> pd.Series:
    """The difference that the headline tells: in accuracy, or in loss where there is none."""
    return comparison.differences.iloc[0]  # they are in this order


def moved(comparison: Comparison, metric: str) -> str:
    """`87 % → 27 %`."""
    return " → ".join(said(comparison, name, metric) for name in (WITHOUT, WITH))


def said(comparison: Comparison, condition: str, metric: str) -> str:
    """A condition's value of a metric."""
    value = getattr(comparison.evaluations[condition], metric)
    return percent(value) if metric == "accuracy" else number(value)


def differences_table(compared: Mapping[str, Comparison]) -> Table:
    table = by_task({name: one.differences for name, one in compared.items()})
    shown = pd.DataFrame(
        {
            "task": table["task"],
            "metric": table["metric"].map(NAMES),
            WITHOUT: [said(compared[r.task], WITHOUT, r.metric) for r in table.itertuples()],
            WITH: [said(compared[r.task], WITH, r.metric) for r in table.itertuples()],
            "difference": [
                f"{change(r.value)} {interval(r.low, r.high)}" for r in table.itertuples()
            ],
            "prompts": table["n"],
        }
    )
    return Table(
        "before-after",
        "With the intervention minus without it, paired by prompt",
        table,
        shown,
        "Intervals: 95 %, bootstrap over prompts. Losses: nats a token, lower is better; of plain "
        "texts over all tokens, else over the answer's.",
    )


def figure(compared: Mapping[str, Comparison]) -> Figure:
    table = by_task({name: one.table for name, one in compared.items()})
    rows = table[table["metric"] != "logit_diff"]
    plot = figures.conditions(rows.assign(condition=rows["task"] + ", " + rows["condition"]))
    return Figure(
        "before-after-values",
        "Each task without the intervention and with it",
        plot,
        table,
        "Lines: 95 % intervals of each value by itself; the table has those of the differences, "
        "which are paired.",
    )


def by_task(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of conditions and metrics as one, with a column `task`."""
    parts = [table.assign(task=name) for name, table in tables.items()]
    return pd.concat(parts, ignore_index=True)
