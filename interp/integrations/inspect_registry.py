"""What inspect_ai finds by its entry point: the provider `interp`. Imports nothing heavy."""

from inspect_ai.model import modelapi


@modelapi(name="interp")
def interp():
    """The class behind `--model interp/MODEL`."""
    from interp.integrations.inspect import InterpAPI

    return InterpAPI
