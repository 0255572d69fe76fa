"""interp: look at attention, score heads, intervene on them, measure what changed, report it.

The public names are imported when first used (PEP 562), so that `import interp` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp import report, tasks
    from interp.analysis.patterns import attention
    from interp.analysis.retrieval import retrieval_heads
    from interp.analysis.sinks import attention_sinks
    from interp.evaluation import compare, evaluate
    from interp.heads import Head, HeadScores
    from interp.intervention.ablate import Ablate
    from interp.intervention.base import Intervention, load_intervention
    from interp.model.hooked import HookedModel, load

    __version__: str

_HOMES = {
    "Ablate": "interp.intervention.ablate",
    "Head": "interp.heads",
    "HeadScores": "interp.heads",
    "HookedModel": "interp.model.hooked",
    "Intervention": "interp.intervention.base",
    "attention": "interp.analysis.patterns",
    "attention_sinks": "interp.analysis.sinks",
    "compare": "interp.evaluation",
    "evaluate": "interp.evaluation",
    "load": "interp.model.hooked",
    "load_intervention": "interp.intervention.base",
    "retrieval_heads": "interp.analysis.retrieval",
}

__all__ = [  # as literals, since type checkers do not read _HOMES
    "Ablate",
    "Head",
    "HeadScores",
    "HookedModel",
    "Intervention",
    "__version__",
    "attention",
    "attention_sinks",
    "compare",
    "evaluate",
    "load",
    "load_intervention",
    "report",
    "retrieval_heads",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in ("report", "tasks"):
        value = importlib.import_module(f"interp.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("interp")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
