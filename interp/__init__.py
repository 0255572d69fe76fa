"""interp: look at attention, score heads, intervene on them, measure what changed, report it.

The public names are imported when first used (PEP 562), so that `import interp` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp import metrics, report, tasks
    from interp.analysis.choices.letters import letter_heads
    from interp.analysis.choices.logit_attribution import (
        direct_effect,
        logit_attribution,
        total_effect,
    )
    from interp.analysis.circuits.edge_curve import edge_curve
    from interp.analysis.circuits.edge_scores import EdgeScores
    from interp.analysis.circuits.edge_search import greedy_edges
    from interp.analysis.circuits.edges import edge_attribution, edge_patching
    from interp.analysis.circuits.find import Circuit, find_circuit
    from interp.analysis.circuits.keeping import circuit_faithfulness
    from interp.analysis.circuits.overlap import circuit_overlap
    from interp.analysis.circuits.roles import head_roles
    from interp.analysis.image_attention import image_attention
    from interp.analysis.image_maps import (
        gradient_attention,
        input_gradient,
        relative_attention,
    )
    from interp.analysis.patching.activation import activation_patching
    from interp.analysis.patching.attribution import attribution_patching, compare_estimate
    from interp.analysis.patching.paths import path_patching
    from interp.analysis.patterns import attention
    from interp.analysis.position_bias import position_bias
    from interp.analysis.probes import probe_heads
    from interp.analysis.retrieval import retrieval_heads
    from interp.analysis.sinks import attention_sinks
    from interp.analysis.vision_heads import vision_head_divergence
    from interp.analysis.visual_sinks import visual_sinks
    from interp.analysis.vit_heads import vit_heads
    from interp.evaluation import compare, evaluate
    from interp.heads import Head, HeadScores
    from interp.intervention.ablate import Ablate
    from interp.intervention.act import ACT
    from interp.intervention.base import Intervention, load_intervention
    from interp.intervention.head_modulation import HeadModulation
    from interp.intervention.hide import HideTokens
    from interp.intervention.iti import ITI
    from interp.intervention.lofit import LoFiT
    from interp.intervention.long_heads import LongHeads
    from interp.intervention.low_rank import LowRank
    from interp.intervention.pine import PINE
    from interp.intervention.re2 import RE2
    from interp.intervention.recycled import RecycledAttention
    from interp.intervention.steer import SteerAttention
    from interp.intervention.temperature import Temperature
    from interp.intervention.var import VAR
    from interp.intervention.vhr import VHR
    from interp.intervention.vicrop import ViCrop
    from interp.intervention.vtc import VTC
    from interp.model.hooked import HookedModel, load

    __version__: str

_HOMES = {
    "ACT": "interp.intervention.act",
    "Ablate": "interp.intervention.ablate",
    "Circuit": "interp.analysis.circuits.find",
    "EdgeScores": "interp.analysis.circuits.edge_scores",
    "Head": "interp.heads",
    "HeadModulation": "interp.intervention.head_modulation",
    "HeadScores": "interp.heads",
    "HideTokens": "interp.intervention.hide",
    "HookedModel": "interp.model.hooked",
    "ITI": "interp.intervention.iti",
    "Intervention": "interp.intervention.base",
    "LoFiT": "interp.intervention.lofit",
    "LongHeads": "interp.intervention.long_heads",
    "LowRank": "interp.intervention.low_rank",
    "PINE": "interp.intervention.pine",
    "RE2": "interp.intervention.re2",
    "RecycledAttention": "interp.intervention.recycled",
    "SteerAttention": "interp.intervention.steer",
    "Temperature": "interp.intervention.temperature",
    "VAR": "interp.intervention.var",
    "VTC": "interp.intervention.vtc",
    "VHR": "interp.intervention.vhr",
    "ViCrop": "interp.intervention.vicrop",
    "activation_patching": "interp.analysis.patching.activation",
    "attention": "interp.analysis.patterns",
    "attention_sinks": "interp.analysis.sinks",
    "attribution_patching": "interp.analysis.patching.attribution",
    "circuit_faithfulness": "interp.analysis.circuits.keeping",
    "circuit_overlap": "interp.analysis.circuits.overlap",
    "compare": "interp.evaluation",
    "compare_estimate": "interp.analysis.patching.attribution",
    "direct_effect": "interp.analysis.choices.logit_attribution",
    "edge_attribution": "interp.analysis.circuits.edges",
    "edge_curve": "interp.analysis.circuits.edge_curve",
    "edge_patching": "interp.analysis.circuits.edges",
    "evaluate": "interp.evaluation",
    "find_circuit": "interp.analysis.circuits.find",
    "gradient_attention": "interp.analysis.image_maps",
    "greedy_edges": "interp.analysis.circuits.edge_search",
    "head_roles": "interp.analysis.circuits.roles",
    "image_attention": "interp.analysis.image_attention",
    "input_gradient": "interp.analysis.image_maps",
    "letter_heads": "interp.analysis.choices.letters",
    "load": "interp.model.hooked",
    "load_intervention": "interp.intervention.base",
    "logit_attribution": "interp.analysis.choices.logit_attribution",
    "path_patching": "interp.analysis.patching.paths",
    "position_bias": "interp.analysis.position_bias",
    "probe_heads": "interp.analysis.probes",
    "relative_attention": "interp.analysis.image_maps",
    "retrieval_heads": "interp.analysis.retrieval",
    "total_effect": "interp.analysis.choices.logit_attribution",
    "vision_head_divergence": "interp.analysis.vision_heads",
    "visual_sinks": "interp.analysis.visual_sinks",
    "vit_heads": "interp.analysis.vit_heads",
}

__all__ = [  # as literals, since type checkers do not read _HOMES
    "ACT",
    "ITI",
    "PINE",
    "RE2",
    "VAR",
    "VHR",
    "VTC",
    "Ablate",
    "Circuit",
    "EdgeScores",
    "Head",
    "HeadModulation",
    "HeadScores",
    "HideTokens",
    "HookedModel",
    "Intervention",
    "LoFiT",
    "LongHeads",
    "LowRank",
    "RecycledAttention",
    "SteerAttention",
    "Temperature",
    "ViCrop",
    "__version__",
    "activation_patching",
    "attention",
    "attention_sinks",
    "attribution_patching",
    "circuit_faithfulness",
    "circuit_overlap",
    "compare",
    "compare_estimate",
    "direct_effect",
    "edge_attribution",
    "edge_curve",
    "edge_patching",
    "evaluate",
    "find_circuit",
    "gradient_attention",
    "greedy_edges",
    "head_roles",
    "image_attention",
    "input_gradient",
    "letter_heads",
    "load",
    "load_intervention",
    "logit_attribution",
    "metrics",
    "path_patching",
    "position_bias",
    "probe_heads",
    "relative_attention",
    "report",
    "retrieval_heads",
    "tasks",
    "total_effect",
    "vision_head_divergence",
    "visual_sinks",
    "vit_heads",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in ("metrics", "report", "tasks"):
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
