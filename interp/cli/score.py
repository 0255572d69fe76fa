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
from interp.cli.prompts import PROMPTS, Wanted, load, prompts_of, sizes

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
