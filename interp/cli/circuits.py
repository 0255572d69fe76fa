"""`interp patch`, `interp circuit`, `interp overlap`: which parts of a model carry a task."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import (
    Device,
    Dtype,
    Form,
    Json,
    Metric,
    Model,
    N,
    Out,
    Overwrite,
    PairData,
    Revision,
    Rows,
    Seed,
    Top,
)
from interp.cli.prompts import PAIRS, Wanted, load, pairs_of

Task = Annotated[str, typer.Option("--task", help=", ".join(PAIRS))]


def patch(
    model: Model,
    out: Out,
    task: Task = "ioi",
    site: Annotated[
        str, typer.Option("--site", help="resid_pre, z, q, k, v, mlp_out, pattern, ...")
    ] = "z",
    by: Annotated[str, typer.Option("--by", help="Axes: layer, head, position.")] = "layer,head",
    direction: Annotated[
        str, typer.Option("--direction", help="denoise (clean values in) or noise.")
    ] = "denoise",
    metric: Metric = "logit_diff",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="By gradients (AtP) instead of one run a cell.")
    ] = False,
    data: PairData = None,
    form: Form = None,
    n: N = 30,
    seed: Seed = 0,
    batch_size: Rows = None,
    top: Top = 10,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Patch every cell of a grid by itself: how far does the answer move?

    Example: interp patch smollm2-135m --task ioi --by layer,position --site resid_pre --out runs/p
    """
    wanted = Wanted(task, data, None, n, seed, allowed=PAIRS, form=form)
    hooked = load(model, dtype, device, revision)
    pairs = pairs_of(hooked, wanted)
    axes = by.replace(",", " ").split()
    options: dict[str, Any] = {"direction": direction}
    if estimate:
        from interp.analysis.patching.attribution import attribution_patching
        from interp.runs import Run
        from interp.tasks.prompts import describe

        settings = {"analysis": "attribution_patching", "site": site, "by": axes, "metric": metric}
        settings |= {**options, "task": describe(pairs), **hooked.provenance()}
        run = Run.open(out, settings, resume=not overwrite)
        found = attribution_patching(hooked, pairs, site, axes, metric, **options)
        found.save(out)
        run.finish(pairs=len(pairs))
    else:
        from interp.analysis.patching.activation import activation_patching

        found = activation_patching(
            hooked, pairs, site, axes, metric, batch_size=batch_size, out=out,
            resume=not overwrite, **options,
        )  # fmt: skip
    print_effects(found, top, out, as_json)


def circuit(
    model: Model,
    out: Out,
    task: Task = "ioi",
    method: Annotated[
        str, typer.Option("--method", help="patching, attribution, paths or greedy.")
    ] = "patching",
    target: Annotated[
        float, typer.Option("--target", help="Faithfulness that the smallest circuit must reach.")
    ] = 0.8,
    size: Annotated[int | None, typer.Option("--size", help="Take so many heads instead.")] = None,
    metric: Metric = "logit_diff",
    data: PairData = None,
    form: Form = None,
    n: N = 64,
    seed: Seed = 0,
    batch_size: Rows = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the heads that carry a task, and how much of it they do by themselves.

    Example: interp circuit smollm2-135m --task ioi --out runs/ioi
    """
    wanted = Wanted(task, data, None, n, seed, allowed=PAIRS, form=form)
    hooked = load(model, dtype, device, revision)
    pairs = pairs_of(hooked, wanted)
    from interp.analysis.circuits.find import find_circuit
    from interp.runs import Run
    from interp.tasks.prompts import describe

    options: dict[str, Any] = {"method": method, "metric": metric, "target": target, "size": size}
    settings = {"analysis": "find_circuit", "task": describe(pairs), "seed": seed}
    run = Run.open(out, settings | options | hooked.provenance(), resume=not overwrite)
    found = find_circuit(hooked, pairs, batch_size=batch_size, seed=seed, **options)
    found.save(out)
    run.finish(pairs=len(pairs), members=len(found.members))
    print_circuit(found, out, as_json)


def overlap(
    one: Annotated[Path, typer.Argument(help="Folder of `interp circuit`.")],
    other: Annotated[Path, typer.Argument(help="Another one, of the same model.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Circuit of an unrelated task; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Do two tasks share their heads, more than chance and more than any two tasks do?

    Example: interp overlap runs/ioi runs/colored --beside runs/letters
    """
    from interp.analysis.circuits.find import Circuit
    from interp.analysis.circuits.overlap import circuit_overlap
    from interp.provenance import plain

    third = {folder.name: Circuit.load(folder) for folder in beside or []}
    found = circuit_overlap(Circuit.load(one), Circuit.load(other), beside=third)
    if as_json:
        about = {"table": found.table.to_dict("records"), "shared": [str(h) for h in found.shared]}
        print(json.dumps(plain(about, "overlap"), indent=2))
        return
    columns = ["one", "other", "size_one", "size_other", "shared", "expected", "p_value"]
    shown = found.table[[*columns, "jaccard", "weighted", "correlation"]]
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print("shared:", ", ".join(map(str, found.shared)) or "none", file=sys.stderr)


def print_effects(found, top: int, out: Path, as_json: bool) -> None:
    """The cells that move most, or all of them as JSON."""
    from interp.provenance import plain

    table = found.table.sort_values("moved", key=abs, ascending=False, kind="stable")
    if as_json:
        about = {"cells": table.to_dict("records"), "metadata": found.metadata, "out": str(out)}
        print(json.dumps(plain(about, "patching"), indent=2))
        return
    print(
        f"{found.metadata['metric']}: clean {found.clean.mean():.3f}, corrupted "
        f"{found.corrupted.mean():.3f}, {len(found.clean)} pairs",
        file=sys.stderr,
    )
    print(table.head(top).to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"all {len(table)} cells: {out / 'cells.parquet'}", file=sys.stderr)


def print_circuit(found, out: Path, as_json: bool) -> None:
    """The members, and how good a circuit they are beside random ones."""
    from interp.provenance import plain

    random = found.tested.iloc[1:]["faithfulness"]
    if as_json:
        about = {"members": [str(h) for h in found.members], "metadata": found.metadata}
        about |= {"tested": found.tested.to_dict("records"), "area": found.area, "out": str(out)}
        print(json.dumps(plain(about, "circuit"), indent=2))
        return
    low, high = found.interval
    print(f"{len(found.members)} of {len(found.heads)} heads: {', '.join(map(str, found.members))}")
    print(f"faithfulness {found.faithfulness:.3f} [{low:.3f}, {high:.3f}]")
    print(f"without them {found.complement:.3f}")
    if len(random):
        print(f"random heads of the same layers {random.mean():.3f} (at most {random.max():.3f})")
    print(f"curve, tests and scores: {out}", file=sys.stderr)
