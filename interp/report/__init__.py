"""The report: sinks, needles, retrieval heads and their ablation, circuits, on one page.

Of a model that sees images also which heads look at them and what it makes up, and with
interventions what they change, task by task.

    from interp import report
    report.write(model, "report/")

Every stage that takes long keeps its results in a folder of its own, so a report that was killed
goes on.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from interp.intervention.base import interventions_of
from interp.model.hooked import HookedModel
from interp.model.images import reads_images
from interp.provenance import versions
from interp.report.before_after import before_after
from interp.report.language import LANGUAGE, language
from interp.report.page import write_page
from interp.report.plan import Plan, Texts
from interp.report.stages import Stages
from interp.report.vision import VISION, vision
from interp.runs import Run

__all__ = ["Plan", "write"]

PAGE = "report.html"


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
    stages = Stages(run.folder, stages_of(model, plan, edits), not overwrite, progress)
    texts = Texts.of(model, plan) if plan.lengths else None
    parts = []
    if texts is not None:
        parts.append(language(model, plan, texts, stages))
    if plan.n_scenes and reads_images(model):
        parts.append(vision(model, plan, stages))
    if edits:
        parts.append(before_after(model, edits, plan, texts, stages))
    stages.begin("page", "writing")

    sections = [section for part in parts for section in part.sections]
    record = run.finish(
        seconds=round(time.monotonic() - began),
        command=command,
        headlines={section.name: section.headline for section in sections},
        prompts={name: about for part in parts for name, about in part.prompts.items()},
        **{name: count for part in parts for name, count in part.counts.items()},
    )
    title = f"Attention heads of {Path(model.name).name}"
    return write_page(run.folder / PAGE, title, sections, about(model, plan, record))


def stages_of(model: HookedModel, plan: Plan, edits: Sequence[Any]) -> list[str]:
    """The stages that there will be, in their order."""
    names = list(LANGUAGE) if plan.lengths else []
    names += list(VISION) if plan.n_scenes and reads_images(model) else []
    return names + ["before and after"] * bool(edits) + ["page"]


def about(model: HookedModel, plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """The provenance of the page."""
    settings, counts = record["settings"], record["counts"]
    packages = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    sessions = record["resumed"]["sessions"]
    hashes = "; ".join(f"{name} {task['sha256'][:16]}" for name, task in counts["prompts"].items())
    tokens = next(iter(counts["prompts"].values()))["tokens"]
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
    }
    if plan.lengths:
        rows |= {
            "needle prompts": f"{plan.n} to score heads (seed {plan.seed}), {plan.n_ablation} "
            f"others to ablate them (seed {plan.seed + 1}); lengths "
            f"{', '.join(map(str, plan.lengths))}",
            "haystack, texts": plan.data or "our own",
            "ablation": f"{plan.how}; {len(counts['ablated'])} heads: "
            f"{' '.join(counts['ablated'])}",
        }
    rows |= {
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
