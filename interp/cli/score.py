"""`interp score`: passes that score the heads of a model."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from interp.cli.options import (
    QUIET,
    BatchSize,
    Data,
    Device,
    Dtype,
    Json,
    Lengths,
    Model,
    N,
    Out,
    Overwrite,
    Revision,
    Seed,
    Top,
)
from interp.cli.prompts import ABOUT_IMAGES, PROMPTS, Wanted, load, prompts_of, sizes
from interp.errors import UserError

app = typer.Typer(**QUIET)


@app.callback()
def score() -> None:
    """Score the heads of a model.

    Example: interp score retrieval smollm2-135m --out runs/retrieval
    """


@app.command("sinks")
def score_sinks(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option("--task", help="text, needle or repeats.")] = "text",
    data: Data = None,
    lengths: Lengths = None,
    n: N = 12,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    top: Top = 10,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """How much attention the first token receives in each head, and which later tokens are sinks.

    Example: interp score sinks smollm2-135m --data my-texts/ --out runs/sinks
    """
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=PROMPTS)
    hooked = load(model, dtype, device, revision)
    from interp.analysis.sinks import attention_sinks

    found = attention_sinks(
        hooked, prompts_of(hooked, wanted), batch_size=batch_size, out=out, resume=not overwrite
    )
    found.tokens.to_parquet(out / "tokens.parquet", index=False)
    print_heads(found.heads, ["rate", "later", "n_later", "value_norm"], top, out, as_json)


@app.command("retrieval")
def score_retrieval(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option("--task", help="needle or repeats.")] = "needle",
    data: Data = None,
    lengths: Lengths = None,
    n: N = 30,
    seed: Seed = 0,
    form: Annotated[str, typer.Option("--form", help="count, set or positions.")] = "count",
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model write, instead of one pass.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--every-prompt", help="Score on prompts it does not answer, too.")
    ] = False,
    batch_size: BatchSize = 4,
    top: Top = 10,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """How much of the answer each head copies out of the text.

    Example: interp score retrieval smollm2-135m --lengths 256,512 --n 40 --out runs/retrieval
    """
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=("needle", "repeats"))
    hooked = load(model, dtype, device, revision)
    from interp.analysis.retrieval import retrieval_heads

    scores = retrieval_heads(
        hooked,
        prompts_of(hooked, wanted),
        form=form,  # pyright: ignore[reportArgumentType]
        how="generate" if generate else "forced",
        span="answer" if task == "needle" else "first",
        only_successes=not every,
        batch_size=batch_size,
        out=out,
        resume=not overwrite,
    )
    print_heads(scores, ["frequency", "mass"], top, out, as_json)


@app.command("vhd")
def score_vhd(
    model: Model,
    out: Out,
    data: Data = None,
    n: N = 32,
    seed: Seed = 0,
    bias: Annotated[str, typer.Option("--bias", help="even, broken or training scenes.")] = "even",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="How much the model writes to each image.")
    ] = 48,
    masked: Annotated[
        bool, typer.Option("--masked", help="Hide the image instead of deleting it.")
    ] = False,
    k: Annotated[
        int | None, typer.Option("--k", help="Heads of a layer that T-VHD adds up.")
    ] = None,
    batch_size: BatchSize = 4,
    top: Top = 10,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """How much each head's output changes when the image is taken away, while captions are written.

    Example: interp score vhd mini-llava --n 64 --out runs/vhd
    """
    hooked = load(model, dtype, device, revision)
    from interp import tasks
    from interp.analysis.vision_heads import vision_head_divergence

    if data is None:
        prompts = tasks.scenes(hooked, n, seed, questions=("caption",), bias=bias)
    else:
        prompts = tasks.pictured(hooked, data)
    found = vision_head_divergence(
        hooked,
        prompts,
        max_new_tokens=new_tokens,
        reference="masked" if masked else "deleted",
        k=k,
        batch_size=batch_size,
        out=out,
        resume=not overwrite,
    )
    print_heads(found.heads, ["relative", "outlier", "chosen"], top, out, as_json)


@app.command("visual-sinks")
def score_visual_sinks(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option("--task", help="scenes, polls or pictured.")] = "scenes",
    data: Data = None,
    dimensions: Annotated[
        str | None, typer.Option("--dimensions", help="Sink dimensions, such as 1415,2533.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option("--tau", help="Default 20 * sqrt(width / 4096).")
    ] = None,
    n: N = 32,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    top: Top = 10,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Which image tokens are attention sinks, and which heads look at the others.

    Example: interp score visual-sinks mini-llava --n 64 --out runs/visual-sinks
    """
    wanted = Wanted(task, data, None, n, seed, allowed=ABOUT_IMAGES)
    chosen = None if dimensions is None else numbers(dimensions)
    hooked = load(model, dtype, device, revision)
    from interp.analysis.visual_sinks import visual_sinks

    found = visual_sinks(
        hooked,
        prompts_of(hooked, wanted),
        dimensions=chosen,
        tau=tau,
        batch_size=batch_size,
        out=out,
        resume=not overwrite,
    )
    found.tokens.to_parquet(out / "tokens.parquet", index=False)
    found.layers.to_parquet(out / "layers.parquet", index=False)
    print(repr(found), file=sys.stderr)
    extra = ["image_mass", "visual_sink_mass", "text_sink_mass"]
    print_heads(found.heads, extra, top, out, as_json)


def numbers(text: str) -> list[int]:
    """`1415,2533` as numbers."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"dimensions={text!r}: numbers, such as 1415,2533.") from None


def print_heads(scores, extra: list[str], top: int, out: Path, as_json: bool) -> None:
    """The best heads as a small table, or all that was found as JSON."""
    from interp.provenance import plain

    table = scores.table.sort_values("score", ascending=False, kind="stable")
    table = table[["layer", "head", "score", "std", "n", *extra]]
    if as_json:
        about = {"heads": table.to_dict("records"), "metadata": scores.metadata, "out": str(out)}
        print(json.dumps(plain(about, "scores"), indent=2))
        return
    counts = scores.metadata.get("counts")
    if counts:
        print(f"{counts['answered']} of {counts['attempted']} prompts answered", file=sys.stderr)
    table.insert(0, "name", [f"L{row.layer}H{row.head}" for row in table.itertuples()])
    rows = table.head(top).drop(columns=["layer", "head"])
    print(rows.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"all {len(table)} heads: {out / 'heads.parquet'}", file=sys.stderr)
