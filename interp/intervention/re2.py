"""RE2: the model reads the question twice. Nothing inside of it is changed.

    {question}
    Read the question again: {question}

What it does, where it is from and what becomes of spans is in `interp.tasks.rereading`; this is the
same as something to apply, save and compare. It changes prompts, so it acts where a run starts from
prompts (`evaluate`, `compare`, harnesses); tokens given to the model itself stay as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from interp.intervention.base import Hook, Intervention, InterventionError
from interp.model.hooked import HookedModel
from interp.tasks.rereading import CUE, read_again


@dataclass(frozen=True, eq=False, repr=False)
class RE2(Intervention):
    """Put a second copy of the span `question` behind it; None: of the whole prompt.

    `cue` is what stands between the copies.
    """

    question: str | None = None
    cue: str = CUE

    def __post_init__(self):
        if self.question is not None and not self.question:
            raise InterventionError("question='': the name of a span, or None for all of a prompt.")

    def __repr__(self) -> str:
        what = "the whole prompt" if self.question is None else f"the span {self.question!r}"
        return f"RE2({what} is read twice, {self.cue.strip()!r} between; in the prompt)"

    def prepare(self, prompt: dict[str, Any], model: HookedModel) -> dict[str, Any]:
        """The prompt with its question twice. Raises `PromptError` where it has no such span."""
        return read_again(model, prompt, self.question, self.cue)

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """None: what goes in is changed, and nothing else."""
        return []
