"""The command line. Heavy packages are imported in the bodies of the commands: `--help` is quick.

What a command prints goes to stdout, what it says about itself to stderr. A user's mistake is a
`UserError`: one line and status 2. A new command is one function in a module of this package, with
an example in its docstring, that calls the library and prints.
"""

import sys
from typing import Annotated

import typer

from interp.cli import circuits, evaluate, fit, harness, models, report, score
from interp.cli.options import QUIET
from interp.errors import UserError

app = typer.Typer(name="interp", add_completion=True, **QUIET)
app.add_typer(models.app, name="models")
app.add_typer(score.app, name="score")
app.add_typer(fit.app, name="fit")
app.command("lm-eval", context_settings=harness.FORWARDED)(harness.lm_eval)
for name, command in {
    "patch": circuits.patch,
    "circuit": circuits.circuit,
    "overlap": circuits.overlap,
    "eval": evaluate.evaluate,
    "report": report.write_report,
}.items():
    app.command(name)(command)


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
