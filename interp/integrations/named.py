"""Interventions as a harness' command line names them, and as its results keep them."""

from pathlib import Path
from typing import Any

from interp.intervention.base import Intervention, interventions_of


def named_interventions(given: Any) -> list[Any]:
    """Interventions, lists of them, folders, and folders joined by ":" as one list.

    A comma parts one option of a harness from the next, so it can't part folders.
    """
    if isinstance(given, int):  # a harness reads the name of a folder `3` as a number
        given = str(given)
    if isinstance(given, str) and not (given and Path(given).expanduser().exists()):
        given = [part for part in given.split(":") if part]
    return interventions_of(given)


def record(edit: Any) -> dict[str, str]:
    """What a result keeps of an intervention."""
    digest = edit.digest if isinstance(edit, Intervention) else ""
    return {"type": type(edit).__name__, "digest": digest, "words": repr(edit)}
