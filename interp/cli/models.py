"""`interp models`: the models that have a name."""

import json
from typing import Annotated

import typer
from typer.core import TyperGroup

from interp.cli.options import QUIET, Json


class ListByDefault(TyperGroup):
    """`interp models` is `interp models list`. (An injected typer.Context would fail the tests'
    type checks: what typer injects is none.)
    """

    def parse_args(self, ctx, args):
        words = [a for a in args if not a.startswith("-")]
        return super().parse_args(ctx, args if words or "--help" in args else ["list", *args])


app = typer.Typer(cls=ListByDefault, **QUIET)


@app.callback()
def models() -> None:
    """List the models that have a name, or fetch one.

    Example: interp models get smollm2-135m
    """


@app.command("list")
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


@app.command("get")
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
