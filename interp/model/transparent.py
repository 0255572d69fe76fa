"""Components that nobody listens to are stepped over: what they wrap is called straight away.

A bridge wraps each module of a model, and every wrapper takes some microseconds to find that it has
nothing to do. Of a pass over many tokens that is nothing; of a generated token, for which most of
300 wrapped modules have one row to multiply, it is a fifth.

Whether somebody listens is asked at each call, so a hook acts from the moment that it is attached.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.block import (
    BlockBridge,
    ParallelBlockBridge,
)
from transformer_lens.model_bridge.generalized_components.conv1d import Conv1DBridge
from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge
from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from interp.model.lazy import LazyAttention
from interp.model.norms import QuietNorm

# kinds that call what they wrap and fire hooks around it; their subclasses may do more
KINDS = (LinearBridge, Conv1DBridge, MLPBridge, GatedMLPBridge)
BLOCKS = (BlockBridge, ParallelBlockBridge)
LISTENERS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Transparent(GeneralizedComponent):
    """Made by `make_transparent`; put in front of the class that a component had."""

    _listeners: tuple[Any, ...]  # each is true where somebody listens

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        replaced = "forward" in own  # by somebody who wants it called
        if replaced or any(own["_listeners"]) or self.must_act(args, kwargs):
            return super().__call__(*args, **kwargs)
        return own["_modules"]["_original_component"](*args, **kwargs)

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        """Would the component do something else than fire hooks?"""
        return self.compatibility_mode


class TransparentBlock(Transparent):
    """A block, which may have to stop or to begin a pass."""

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        told = any(self.__dict__.get(f"_{at}_at_layer_idx") is not None for at in ("stop", "start"))
        # called by itself, with nothing but the stream, it gives a tuple
        return told or len(args) + len(kwargs) == 1 or self.compatibility_mode


class TransparentAttention(Transparent, LazyAttention):
    """Lazy attention, which may have to be eager."""

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        return self.must_be_eager


class TransparentNorm(Transparent, QuietNorm):
    """A norm, where the bridge calls the wrapped one."""

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        return not self.use_native_layernorm_autograd or self.compatibility_mode


@dataclass(eq=False)
class Wiring:
    """What the bridge has attached to its own components, so that it is not taken for a listener.

    `known`: ids of hooks. `points`, by component: hook points that those hooks fire. `forked`: the
    attention that reads its norm's input, where it has to be eager.
    """

    known: set[int] = field(default_factory=set)
    points: dict[nn.Module, list[HookPoint]] = field(default_factory=lambda: defaultdict(list))
    forked: dict[nn.Module, LazyAttention] = field(default_factory=dict)

    def of_block(self, block: BlockBridge) -> None:
        """The hooks by which a block captures what goes into its norms or its MLP."""
        block._maybe_wire_capture_hooks()
        self.known |= {handle.id for handle in block._capture_hook_handles}
        parts = block.submodules
        reader = parts.get("mlp" if block.mlp_reads_resid_directly else "ln2")
        if reader is not None:
            self.points[reader].append(block.hook_mlp_in)
        if "ln1" in parts and isinstance(parts.get("attn"), LazyAttention):
            self.forked[parts["ln1"]] = parts["attn"]

    def of_attention(self, attention: LazyAttention) -> None:
        """The hooks by which lazy attention fires those that a module inside would not."""
        for module, handle, points in attention.fires:
            self.known.add(handle.id)
            self.points[module] += points


@dataclass(eq=False)
class Others:
    """True where a module has hooks beside the known ones, or where those have to act."""

    hooks: Mapping[int, Any]
    known: set[int]
    forked: LazyAttention | None

    def __bool__(self) -> bool:
        acts = self.forked is not None and self.forked.must_be_eager
        return acts or not self.known.issuperset(self.hooks)


def make_transparent(model: nn.Module) -> None:
    """Let every component of a bridge that can be stepped over be so, in place."""
    modules, wiring = list(model.modules()), Wiring()
    for module in modules:
        if isinstance(module, BlockBridge):
            wiring.of_block(module)
        if isinstance(module, LazyAttention):
            wiring.of_attention(module)
    for component in modules:
        front = _front(component)
        if front is not None:
            kind = type(component)
            component.__class__ = type(f"Transparent{kind.__name__}", (front, kind), {})
            component.__dict__["_listeners"] = tuple(_listeners(component, wiring))


def _front(component: nn.Module) -> type[Transparent] | None:
    """What a component of this kind becomes; None where it may do more than fire hooks."""
    if not isinstance(component, GeneralizedComponent) or component.name is None:
        return None
    if isinstance(component, LazyAttention):
        return TransparentAttention
    if isinstance(component, QuietNorm):
        return TransparentNorm if type(component).forward is NormalizationBridge.forward else None
    if type(component) in BLOCKS:
        return TransparentBlock
    return Transparent if type(component) in KINDS else None


def _listeners(component: GeneralizedComponent, wiring: Wiring) -> Iterator[Any]:
    """All that is true where a hook would fire in the component: torch's dicts of hooks, mostly."""
    forked = wiring.forked.get(component)
    for hooks in _hooks_on(component):
        wired = wiring.known.intersection(hooks)
        yield Others(hooks, wiring.known, forked) if wired else hooks
    # an MLP whose projections are passed by fires their hooks itself
    inside = component.submodules.values() if isinstance(component, MLPBridge) else ()
    own = (m for part in (component, *inside) for m in part.children() if isinstance(m, HookPoint))
    for point in (*own, *wiring.points[component]):
        yield from _hooks_on(point)


def _hooks_on(module: nn.Module) -> Iterator[Mapping[int, Any]]:
    return (module.__dict__[name] for name in LISTENERS)
