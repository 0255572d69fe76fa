"""`interp eval`: how well a model does on a task, and what interventions change."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Form,
    Json,
    Lengths,
    Model,
    N,
    Overwrite,
    Revision,
    Seed,
)
from interp.cli.prompts import (
    ABOUT_IMAGES,
    PROMPTS,
    QUESTIONS,
    Wanted,
    load,
    prompts_of,
    sizes,
)

TASKS = (*PROMPTS, *QUESTIONS, *ABOUT_IMAGES)


def evaluate(
    model: Model,
    task: Annotated[str, typer.Option("--task", help=", ".join(TASKS))],
    intervention: Annotated[
        list[Path] | None,
        typer.Option("--intervention", help="Folder of a saved intervention; may be repeated."),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model write, instead of one pass.")
    ] = False,
    data: Data = None,
    form: Form = None,
    lengths: Lengths = None,
    n: N = 20,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for every prompt's numbers.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Accuracy and loss on a task, with intervals; with interventions beside the model without.

    Example: interp eval smollm2-135m --task needle --lengths 256 --intervention runs/ablate
    """
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=TASKS, form=form)
    from interp.intervention.base import load_intervention

    edits = [load_intervention(folder) for folder in intervention or []]
    hooked = load(model, dtype, device, revision)
    prompts = prompts_of(hooked, wanted)
    from interp.evaluation import compare
    from interp.runs import Run
    from interp.tasks.prompts import describe

    conditions = {"none": []} | ({"intervention": edits} if edits else {})
    for edit in edits:  # a head that is not there is told before anything runs
        list(edit.hooks(hooked))
    run = None
    if out is not None:
        settings = {"analysis": "evaluate", "generate": generate, "task": describe(prompts)}
        settings |= {"interventions": [e.digest for e in edits], **hooked.provenance()}
        run = Run.open(out, settings, resume=not overwrite)
    found = compare(hooked, prompts, conditions, generate=generate, batch_size=batch_size)
    if run is not None:
        save_evaluation(found, run)
    print_evaluation(found, [repr(edit) for edit in edits], as_json)


def save_evaluation(found, run) -> None:
    """Every prompt under every condition, the summary, and that the run is complete."""
    import pandas as pd

    parts = [e.table.assign(condition=name) for name, e in found.evaluations.items()]
    pd.concat(parts, ignore_index=True).to_parquet(run.folder / "prompts.parquet", index=False)
    found.table.to_parquet(run.folder / "evaluation.parquet", index=False)
    run.finish(prompts=len(parts[0]), conditions=list(found.evaluations))


def print_evaluation(found, edits: list[str], as_json: bool) -> None:
    """The table of conditions, and what changed, paired by prompt."""
    from interp.provenance import plain

    tables = {"conditions": found.table}
    if edits:
        tables["differences"] = found.differences
    if as_json:
        about: dict[str, Any] = {name: t.to_dict("records") for name, t in tables.items()}
        about |= {"interventions": edits, "metadata": found.evaluations["none"].metadata}
        print(json.dumps(plain(about, "evaluation"), indent=2))
        return
    for line in edits:
        print(f"intervention: {line}", file=sys.stderr)
    for name, table in tables.items():
        if name == "differences":
            print("\ndifference from none, paired by prompt")
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
