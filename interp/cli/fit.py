"""`interp fit`: interventions that are learned or measured on a task, saved in a folder."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import (
    QUIET,
    BatchSize,
    Data,
    Device,
    Dtype,
    Form,
    Json,
    Lengths,
    Model,
    N,
    Out,
    Overwrite,
    Revision,
    Seed,
)
from interp.cli.prompts import QUESTIONS, Wanted, load, prompts_of, sizes
from interp.errors import UserError

ANSWERED = (*QUESTIONS, "needle", "repeats")

app = typer.Typer(**QUIET)

Task = Annotated[str, typer.Option("--task", help=", ".join(ANSWERED))]
Heads = Annotated[
    str | None,
    typer.Option("--heads", help="Such as 3.5,4.1, or a file of scores, of which --k are taken."),
]
K = Annotated[str, typer.Option("--k", help="How many heads: 16, or a share of all, 0.1.")]


@app.callback()
def fit() -> None:
    """Fit an intervention on a task and save it; measure it on other prompts (another --seed).

    Example: interp fit lofit smollm2-135m --task multiple_choice --n 256 --out runs/lofit
    """


@app.command("act")
def fit_act(
    model: Model,
    task: Task,
    out: Out,
    heads: Annotated[
        str | None, typer.Option("--heads", help="Candidates, such as 3.5,4.1; default: most.")
    ] = None,
    factor: Annotated[float, typer.Option("--factor", help="What later sinks keep, 0 to 1.")] = 0.4,
    alpha: Annotated[
        float, typer.Option("--alpha", help="A sink gets more than alpha / tokens.")
    ] = 5.0,
    decode: Annotated[str, typer.Option("--decode", help="prefill, frozen or running.")] = "frozen",
    data: Data = None,
    form: Form = None,
    lengths: Lengths = None,
    n: N = 100,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """ACT: the heads in which damping later attention sinks helps, one head at a time.

    Example: interp fit act smollm2-135m --task multiple_choice --n 200 --out runs/act
    """
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=ANSWERED, form=form)
    hooked = load(model, dtype, device, revision)
    from interp.heads import heads_of
    from interp.intervention.act import ACT

    fitted = ACT.fit(
        hooked,
        prompts_of(hooked, wanted),
        None if heads is None else heads_of(heads),
        batch_size=batch_size,
        out=out,
        resume=not overwrite,
        factor=factor,
        alpha=alpha,
        decode=decode,
    )
    save(fitted, hooked, out, as_json)


@app.command("lofit")
def fit_lofit(
    model: Model,
    task: Task,
    out: Out,
    heads: Heads = None,
    k: K = "0.1",
    objective: Annotated[
        str, typer.Option("--objective", help="answers (likelihood) or preferences (DPO).")
    ] = "answers",
    validation: Annotated[
        float, typer.Option("--validation", help="Share of prompts that say when to stop.")
    ] = 0.2,
    epochs: Annotated[int, typer.Option("--epochs", help="Of either stage, at most.")] = 5,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the vectors.")] = 1e-2,
    l1: Annotated[float, typer.Option("--l1", help="How dear scalings are (selection).")] = 1e-3,
    data: Data = None,
    form: Form = None,
    lengths: Lengths = None,
    n: N = 200,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """LoFiT: select heads by learned scalings, then learn a vector for each of them.

    Example: interp fit lofit smollm2-135m --task multiple_choice --k 0.1 --out runs/lofit
    """
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=ANSWERED, form=form)
    count = share_or_count(k)
    hooked = load(model, dtype, device, revision)
    from dataclasses import replace

    from interp.intervention.lofit import OFFSETS, SELECTION, LoFiT

    common = {"epochs": epochs, "batch_size": batch_size}
    fitted = LoFiT.fit(
        hooked,
        prompts_of(hooked, wanted),
        chosen_heads(heads, count),
        k=count,
        validation=validation,
        objective=objective,  # pyright: ignore[reportArgumentType]
        selection=replace(SELECTION, l1=l1, **common),
        tuning=replace(OFFSETS, lr=lr, **common),
        seed=seed,
        out=out,
        resume=not overwrite,
    )
    save(fitted, hooked, out, as_json)


@app.command("iti")
def fit_iti(
    model: Model,
    task: Task,
    out: Out,
    heads: Heads = None,
    k: K = "0.05",
    strength: Annotated[
        float, typer.Option("--strength", help="How many standard deviations.")
    ] = 15.0,
    direction: Annotated[
        str, typer.Option("--direction", help="mass_mean, probe or random.")
    ] = "mass_mean",
    at: Annotated[str, typer.Option("--at", help="end or all (tokens).")] = "end",
    data: Data = None,
    form: Form = None,
    lengths: Lengths = None,
    n: N = 200,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """ITI: push the heads that tell right answers from wrong ones towards the right.

    Example: interp fit iti smollm2-135m --task multiple_choice --strength 5 --out runs/iti
    """
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=ANSWERED, form=form)
    count = share_or_count(k)
    hooked = load(model, dtype, device, revision)
    prompts = prompts_of(hooked, wanted)
    from interp.intervention.iti import ITI
    from interp.runs import Run
    from interp.tasks.prompts import describe

    options: dict[str, Any] = {"strength": strength, "direction": direction, "at": at}
    settings = {"analysis": "iti", "heads": heads, "k": k, "seed": seed, **options}
    settings |= {"task": describe(prompts), **hooked.provenance()}
    run = Run.open(out, settings, resume=not overwrite)
    picked = chosen_heads(heads, count)
    fitted = ITI.fit(
        hooked, prompts, heads=picked, k=count, seed=seed, batch_size=batch_size, **options
    )
    run.finish(prompts=len(prompts), heads=len(fitted.heads))
    save(fitted, hooked, out, as_json)


def share_or_count(k: str) -> int | float:
    """`16` as a number of heads, `0.1` as a share of them."""
    try:
        found = float(k) if "." in k else int(k)
    except ValueError:
        found = -1
    if found <= 0 or (isinstance(found, float) and found > 1):
        raise UserError(f"k={k!r}: a number of heads such as 16, or a share of all such as 0.1.")
    return found


def chosen_heads(heads: str | None, k: int | float):
    """Heads by name, or the best `k` in a file of scores; None where none are named."""
    from interp.heads import HeadScores, heads_of

    if heads is None or not Path(heads).is_file():
        return None if heads is None else heads_of(heads)
    scores = HeadScores.load(heads)
    return scores.top(fraction=k) if isinstance(k, float) else scores.top(k)


def save(fitted, model, out: Path, as_json: bool) -> None:
    """Leave the intervention in the run's folder, and say what it is."""
    folder = fitted.save_pretrained(out)
    if as_json:
        about = {"type": type(fitted).__name__, "words": repr(fitted), "digest": fitted.digest}
        about |= {"heads": [str(head) for head in fitted.heads], "out": str(folder)}
        print(json.dumps(about | {"stored_numbers": fitted.n_stored}, indent=2))
        return
    print(fitted.describe(model))
    if not fitted.heads:
        print("no head was accepted: applied, it does nothing", file=sys.stderr)
    print(f"measure it: interp eval ... --intervention {folder}", file=sys.stderr)
