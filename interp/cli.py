"""The command line. Heavy packages are imported in the bodies of the commands: `--help` is quick.

What a command prints goes to stdout, what it says about itself to stderr. A user's mistake is a
`UserError`: one line and status 2. A new command is one function here with an example in its
docstring, that calls the library and prints.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from interp.errors import UserError

QUIET = {"pretty_exceptions_enable": False, "rich_markup_mode": None}


class ListByDefault(TyperGroup):
    """`interp models` is `interp models list`. (An injected typer.Context would fail the tests'
    type checks: what typer injects is none.)
    """

    def parse_args(self, ctx, args):
        words = [a for a in args if not a.startswith("-")]
        return super().parse_args(ctx, args if words or "--help" in args else ["list", *args])


app = typer.Typer(name="interp", add_completion=True, **QUIET)
models_app = typer.Typer(cls=ListByDefault, **QUIET)
app.add_typer(models_app, name="models")
score_app = typer.Typer(**QUIET)
app.add_typer(score_app, name="score")

PROMPTS = ("needle", "repeats", "text")
QUESTIONS = ("ioi", "colored_objects", "multiple_choice")

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
    typer.Option("--data", help="A .txt file or a folder of them (needle: the haystack)."),
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


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 only when all was done, 2 for a user's mistake."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args  # wherever it stands: people add it at the end
    try:
        rest = [a for a in args if a != "--debug"]
        status = app(rest or ["--help"], "interp", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Exception as error:
        if debug:
            raise
        return complain(error)


def complain(error: Exception) -> int:
    """Say on one line of stderr what went wrong; returns the exit status."""
    if isinstance(error, UserError):
        line, status = str(error), 2
    elif isinstance(error, typer.TyperException):  # its own: unknown option, missing argument
        line, status = f"{error.format_message()} ({command_of(error)} --help tells more)", 2
    elif isinstance(error, OSError) and error.filename is not None:
        line, status = f"{error.filename}: {error.strerror}", 2
    else:
        line = f"{type(error).__name__}: {error} (add --debug for the traceback)"
        status = 1
    print("error:", " ".join(line.split()), file=sys.stderr)
    return status


def command_of(error: Exception) -> str:
    """The command that was typed wrong, such as `interp models get`."""
    context = getattr(error, "ctx", None)
    return context.command_path if context else "interp"


def print_version(asked: bool) -> bool:
    """What `--version` does, before anything else is looked at."""
    if asked:
        from importlib.metadata import version

        print(f"interp {version('interp')}")
        raise typer.Exit
    return asked


@app.callback()
def interp(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Look at attention, score heads, intervene on them, measure, report.

    Example: interp models
    """


@models_app.callback()
def models() -> None:
    """List the models that have a name, or fetch one.

    Example: interp models get smollm2-135m
    """


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """List the models that have a name; `interp models` alone does the same.

    Example: interp models --json
    """
    from interp import zoo

    known = zoo.models()
    if as_json:
        print(json.dumps([about(model) for model in known], indent=2))
        return
    for model in known:
        absent = f"not fetched ({model.size})" if model.package else "not in this checkout"
        print(f"{model.name:<14}  {'installed' if model.installed else absent}")
        print(f"    {model.description}\n    {model.licence}, from {model.source}")


@models_app.command("get")
def models_get(
    name: Annotated[str, typer.Argument(help="A name that `interp models` lists.")],
    as_json: Json = False,
) -> None:
    """Fetch a model and print its folder.

    Example: interp models get smollm2-135m
    """
    from interp import zoo

    folder = zoo.get(name)
    print(json.dumps(about(zoo.known_model(name)), indent=2) if as_json else folder)


def about(model) -> dict:
    """A known model for --json."""
    return {
        "name": model.name,
        "installed": model.installed,
        "folder": str(model.folder),
        "source": model.source,
        "size": model.size,
        "licence": model.licence,
        "description": model.description,
    }


# Scoring heads


@score_app.callback()
def score() -> None:
    """Score the heads of a model.

    Example: interp score retrieval smollm2-135m --out runs/retrieval
    """


@score_app.command("sinks")
def score_sinks(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option("--task", help="text, needle or repeats.")] = "text",
    data: Data = None,
    lengths: Lengths = None,
    n: N = 12,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    top: Annotated[int, typer.Option("--top", help="How many heads to print.")] = 10,
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


@score_app.command("retrieval")
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
    top: Annotated[int, typer.Option("--top", help="How many heads to print.")] = 10,
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


# Measuring a model


@app.command("eval")
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option("--task", help=", ".join((*PROMPTS, *QUESTIONS)))],
    intervention: Annotated[
        list[Path] | None,
        typer.Option("--intervention", help="Folder of a saved intervention; may be repeated."),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model write, instead of one pass.")
    ] = False,
    data: Data = None,
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
    wanted = Wanted(task, data, sizes(lengths), n, seed, allowed=(*PROMPTS, *QUESTIONS))
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


# The report


@app.command("report")
def write_report(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option("--task", help="What heads are scored on.")] = "needle",
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
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    page = report.write(
        hooked, out, make(**changes), overwrite=overwrite, command=shlex.join(words)
    )
    print(page)


# What the commands share


@dataclass(frozen=True)
class Wanted:
    """The prompts that were asked for; wrong ones are told before a model is loaded."""

    task: str
    data: Path | None
    lengths: tuple[int, ...] | None
    n: int
    seed: int
    allowed: tuple[str, ...]

    def __post_init__(self):
        if self.task not in self.allowed:
            near = get_close_matches(self.task, self.allowed, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"task={self.task!r}: one of {', '.join(self.allowed)}.{hint}")
        if self.data is not None and self.task not in ("needle", "text"):
            raise UserError(f"data={str(self.data)!r}: the task {self.task!r} takes no texts.")
        if self.data is not None and not self.data.exists():
            raise UserError(f"data={str(self.data)!r}: no such file or folder.")


def sizes(text: str | None) -> tuple[int, ...] | None:
    """`128,256` as numbers."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"lengths={text!r}: numbers of tokens, such as 128,256.")
    return found


def load(model: str, dtype: str | None, device: str | None, revision: str | None):
    """The hooked model, without the progress bars of transformers."""
    import torch
    from transformers.utils import logging

    import interp

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise UserError(f"device={device!r}: cpu, cuda, cuda:0, mps, ...") from None
    return interp.load(model, dtype=dtype, device=device, revision=revision)


def prompts_of(model, wanted: Wanted):
    """The prompts of a task, for this model's tokens and context window."""
    import importlib

    from interp import tasks

    lengths, n, seed = wanted.lengths, wanted.n, wanted.seed
    if wanted.task == "needle":
        from interp.report.plan import lengths_for

        haystack = None if wanted.data is None else str(wanted.data)
        grid = list(lengths or lengths_for(model, seed))
        return tasks.needle(model, grid, n=n, seed=seed, haystack=haystack)
    if wanted.task == "repeats":
        return tasks.repeats(model, n=n, length=(lengths or (50,))[0], seed=seed)
    if wanted.task == "text":
        size = (lengths or (min(128, model.cfg.n_ctx),))[0]
        if wanted.data is None:
            return tasks.text(model, max_tokens=size, n=n, seed=seed)
        found = tasks.text(model, wanted.data, max_tokens=size)
        return found.select(range(min(n, len(found))))
    examples = importlib.import_module(f"interp.tasks.{wanted.task}").examples(n, seed)
    about = {"n": n, "seed": seed}
    return tasks.from_examples(model, examples, task=wanted.task, parameters=about)
