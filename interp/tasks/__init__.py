"""Tasks: prompts with answers and named spans, made for a model's own tokenizer.

The functions bear the names of their modules and are bound here at once: were they bound lazily,
importing a module first (`interp.tasks.needle`) would hide the function of the same name.
"""

from interp.tasks.colored_objects import colored_objects
from interp.tasks.digits import digits
from interp.tasks.documents import documents
from interp.tasks.ioi import ioi
from interp.tasks.multiple_choice import multiple_choice
from interp.tasks.needle import Needle, needle
from interp.tasks.pairs import corrupted, pairs
from interp.tasks.pictured import pictured
from interp.tasks.prompts import PromptError, SpanError, as_prompts, describe, from_examples
from interp.tasks.repeats import repeats
from interp.tasks.scenes import polls, scenes
from interp.tasks.text import text

__all__ = [
    "Needle",
    "PromptError",
    "SpanError",
    "as_prompts",
    "colored_objects",
    "corrupted",
    "describe",
    "digits",
    "documents",
    "from_examples",
    "ioi",
    "multiple_choice",
    "needle",
    "pairs",
    "pictured",
    "polls",
    "repeats",
    "scenes",
    "text",
]
