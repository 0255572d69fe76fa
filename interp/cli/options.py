"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

QUIET = {"pretty_exceptions_enable": False, "rich_markup_mode": None}

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name that `interp models` lists, a folder, an id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; a killed run goes on.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew where --out holds results already.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Texts, file or folder (needle: haystack); pictured: .jsonl."),
]
Lengths = Annotated[
    str | None, typer.Option("--lengths", help="Prompt lengths in tokens, such as 128,256.")
]
N = Annotated[int, typer.Option("--n", help="How many prompts.")]
Seed = Annotated[int, typer.Option("--seed", help="The prompts are drawn by it.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Prompts in one forward pass.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch or commit of a hub id.")]
Top = Annotated[int, typer.Option("--top", help="How many heads to print.")]
Form = Annotated[
    str | None, typer.Option("--form", help="Of colored_objects: plain (the default) or paper.")
]
PairData = Annotated[
    Path | None,
    typer.Option("--data", help="pairs: a .jsonl file; colored_objects: BIG-bench's task.json."),
]
Metric = Annotated[str, typer.Option("--metric", help="logit_diff, log_prob, prob or kl.")]
Rows = Annotated[
    int | None, typer.Option("--batch-size", help="Prompts in one pass; default by memory.")
]
