"""`interp report`: the whole loop on one page."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Lengths,
    Model,
    Out,
    Overwrite,
    Revision,
    Seed,
)
from interp.cli.prompts import Wanted, load, sizes
from interp.errors import UserError


def write_report(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option("--task", help="What heads are scored on.")] = "needle",
    intervention: Annotated[
        list[Path] | None,
        typer.Option("--intervention", help="A saved one: what does it change? May be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look, in a minute or two.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Some ten times the default.")] = False,
    data: Data = None,
    lengths: Lengths = None,
    n: Annotated[int | None, typer.Option("--n", help="Needle prompts that score heads.")] = None,
    draws: Annotated[
        int | None, typer.Option("--draws", help="Random controls of the ablation.")
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Sinks, retrieval heads and their ablation on one page; prints where it is.

    Example: interp report smollm2-135m --out report/
    """
    if quick and full:
        raise UserError("--quick, --full: one of them, or neither.")
    wanted = Wanted(task, data, sizes(lengths), n or 1, seed, allowed=("needle",))
    from interp.intervention.base import interventions_of

    edits = interventions_of(intervention)
    hooked = load(model, dtype, device, revision)
    from interp import report

    asked = {"lengths": wanted.lengths, "n": n, "draws": draws, "data": data and str(data)}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    changes |= {"seed": seed, "batch_size": batch_size}
    make = report.Plan.quick if quick else report.Plan.full if full else report.Plan
    options = {"dtype": dtype, "device": device, "revision": revision, "lengths": lengths}
    options |= {"data": data, "n": n, "draws": draws, "seed": seed or None}
    options |= {"batch-size": batch_size if batch_size != 4 else None}
    words = ["interp", "report", model, "--out", str(out)]
    words += ["--quick"] * quick + ["--full"] * full
    words += [word for folder in intervention or [] for word in ("--intervention", str(folder))]
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    about = {"overwrite": overwrite, "command": shlex.join(words)}
    print(report.write(hooked, out, make(**changes), interventions=edits, **about))
