"""`interp lm-eval`: lm-evaluation-harness, with the model `interp` in it."""

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from interp.errors import UserError

# All that the harness is given belongs to it, options of its own included.
FORWARDED = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def lm_eval(
    arguments: Annotated[
        list[str], typer.Argument(metavar="...", help="As for lm-eval; `run --help` lists them.")
    ],
) -> None:
    """Run lm-evaluation-harness; the model is `interp` unless --model names another.

    Several interventions are folders joined by ":".

    Example: interp lm-eval --model_args pretrained=smollm2-135m,intervention=runs/act
    --include_path data/tasks --tasks interp_letters
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed: pip install 'interp[harness]'")
    from lm_eval.__main__ import cli_evaluate

    import interp.integrations.lm_eval  # noqa: F401  (registers the model)

    before = sys.argv
    sys.argv = ["lm-eval", *with_model(arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def with_model(arguments: list[str]) -> list[str]:
    """The harness' arguments for a run, with `--model interp` where they name no model."""
    runs = arguments[:1] == ["run"] or arguments[0].startswith("-")
    asks = {"-h", "--help", "-C", "--config"} & set(arguments)  # a config may name one
    named = any(a in ("--model", "-M") or a.startswith("--model=") for a in arguments)
    if not runs or asks or named:
        return arguments
    rest = arguments[1:] if arguments[0] == "run" else arguments
    return ["run", "--model", "interp", *rest]
