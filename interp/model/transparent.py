"""Components that nobody listens to are stepped over: what they wrap is called straight away.

A bridge wraps each module of a model, and every wrapper takes some microseconds to find that it has
nothing to do. Of a pass over many tokens that is nothing; of a generated token, for which most of
300 wrapped modules have one row to multiply, it adds a sixth (SmolLM2-135M on two cores).

While a block runs, what nobody listens to in it is left out. Whoever attaches a hook says so here:
then blocks look anew who listens, and one that runs gets back what it left out, so that a hook acts
from the moment that it is attached.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter, signature
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle
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

    _listeners: tuple[Any, ...]  # each is true where the component has to act
    _replaced: dict[str, Callable]  # the `forward` that stands in for its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(self._listeners) or self.must_act(args, kwargs):
            return self.act(*args, **kwargs)
        return self._wrapped(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("original_component", "_original_component"):
            Attached.changed()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        Attached.changed()

    @property
    def _wrapped(self) -> Any:
        return self._modules["_original_component"]

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """What the bridge does; it looks for offloaded weights each time, which few models have."""
        if "_hf_hook" in vars(self._wrapped):
            return super().__call__(*args, **kwargs)
        return nn.Module.__call__(self, *args, **kwargs)

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        """Would it do something else than fire hooks?"""
        return self.compatibility_mode


@dataclass(frozen=True, eq=False)
class Places:
    """Components that may be left out of one module, by name, and what they wrap.

    Whole dicts, put in and taken out at once: a block's components are spread over memory, and to
    look at each takes longer than what it does.
    """

    modules: dict[str, Any]
    whole: dict[str, Any]  # `modules` as it was when it was looked at
    components: dict[str, Any]
    wrapped: dict[str, Any]

    @property
    def as_they_were(self) -> bool:
        """Does nothing else stand there by now?"""
        return self.modules == self.whole

    def leave_out(self) -> None:
        self.modules.update(self.wrapped)

    def put_back(self) -> None:
        self.modules.update(self.components)


class Attached:
    """How often something was attached to components, of any model, and what blocks that run at
    the moment left out."""

    times: int = 0
    left_out: ClassVar[dict[object, Sequence[Places]]] = {}  # by call

    @classmethod
    def changed(cls) -> None:
        """Something was, or is no longer: blocks look anew."""
        cls.times += 1
        for left_out in list(cls.left_out.values()):
            for places in left_out:
                places.put_back()


def put_in(component: nn.Module, forward: Callable | None) -> None:
    """Let `forward` be called in place of a component's own; None: its own again."""
    # through __dict__: the bridge would forward the attribute to what it wraps
    for where in (component.__dict__, component.__dict__.get("_replaced", {})):
        where.pop("forward", None)
        if forward is not None:
            where["forward"] = forward
    Attached.changed()


@contextmanager
def stands_in(component: nn.Module, forward: Callable) -> Iterator[None]:
    """The same, for as long as the block lasts."""
    put_in(component, forward)
    try:
        yield
    finally:
        put_in(component, None)


class Handle(RemovableHandle):
    """Of a hook whose end is noticed, too."""

    def remove(self) -> None:
        super().remove()
        Attached.changed()


class Waking(nn.Module):
    """Made by `make_transparent` of all that hooks are attached to; it says when one is."""


def _waking(name: str) -> Callable:
    def register(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        handle = getattr(super(Waking, self), name)(*args, **kwargs)
        handle.__class__ = Handle
        Attached.changed()
        return handle

    return register


for _name in ("forward_pre", "forward", "full_backward_pre", "full_backward", "backward"):
    setattr(Waking, f"register_{_name}_hook", _waking(f"register_{_name}_hook"))


class TransparentBlock(Transparent):
    """A block; what nobody listens to inside is left out while it runs."""

    _inside: tuple[tuple[dict[str, Any], dict[str, Transparent]], ...] = ()
    _eager: Any = False  # true where lazy attention inside has to be eager
    # when it looked last, and what it found
    _looked: int = -1
    _listened: bool = False
    _quiet: Sequence[Places] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._eager or self.must_act(args, kwargs):
            return super().__call__(*args, **kwargs)
        if self._looked != Attached.times or not all(p.as_they_were for p in self._quiet):
            self._look()
        call, quiet = object(), self._quiet
        for places in quiet:
            places.leave_out()
        Attached.left_out[call] = quiet
        try:
            run = self.act if self._listened else self._wrapped
            return run(*args, **kwargs)
        finally:
            del Attached.left_out[call]
            for places in quiet:
                places.put_back()

    def _look(self) -> None:
        """Who is listened to?"""
        quiet = []
        for modules, may in self._inside:
            free = {
                name: one
                for name, one in may.items()
                if modules[name] is one and not any(one._listeners)
            }
            wrapped = {name: one._wrapped for name, one in free.items()}
            quiet.append(Places(modules, dict(modules), free, wrapped))
        listened = any(self._listeners)
        self.__dict__.update(_looked=Attached.times, _listened=listened, _quiet=quiet)

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        own = self.__dict__
        stops, starts = own.get("_stop_at_layer_idx"), own.get("_start_at_layer_idx")
        # called by itself, with nothing but the stream, it gives a tuple
        alone = len(args) + len(kwargs) == 1
        told = alone or stops is not None or starts is not None
        return told or self.compatibility_mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The bridge's, without looking for modes that are off."""
        if self.must_act(args, kwargs) or self._eager:
            return super().forward(*args, **kwargs)
        args, kwargs = self._hook_input_hidden_states(args, kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        kwargs = self._filter_kwargs_for_forward(kwargs, len(args))
        output = self._wrapped(*args, **kwargs)
        return self._apply_output_hook(output)  # pyright: ignore[reportAttributeAccessIssue]

    def _filter_kwargs_for_forward(self, kwargs: dict, num_positional_args: int = 0) -> dict:
        """The bridge reads the signature each time."""
        if _takes_any(type(self.original_component)):
            return kwargs
        return super()._filter_kwargs_for_forward(kwargs, num_positional_args)  # pyright: ignore[reportAttributeAccessIssue]


class TransparentNorm(Transparent, QuietNorm):
    """A norm, where the bridge calls the wrapped one."""

    def must_act(self, args: tuple, kwargs: dict) -> bool:
        return not self.use_native_layernorm_autograd or self.compatibility_mode


@cache
def _takes_any(kind: type) -> bool:
    """Does its forward take any named argument?"""
    parameters = signature(kind.forward).parameters.values()
    return any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters)


@dataclass(eq=False)
class Eager:
    """True where lazy attention has to be eager."""

    attention: LazyAttention

    def __bool__(self) -> bool:
        return self.attention.must_be_eager


@dataclass(eq=False)
class Wiring:
    """What the bridge has attached to its own components, so that it is not taken for a listener.

    `known`: ids of hooks. `points`, by component: hook points that those hooks fire. `forked`: the
    attention that reads its norm's input, where it has to be eager; `eager`: whether it has to be.
    """

    known: set[int] = field(default_factory=set)
    points: dict[nn.Module, list[HookPoint]] = field(default_factory=lambda: defaultdict(list))
    forked: dict[nn.Module, LazyAttention] = field(default_factory=dict)
    eager: dict[LazyAttention, Eager] = field(default_factory=dict)

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
    """True where a module has hooks beside the known ones."""

    hooks: Mapping[int, Any]
    known: set[int]

    def __bool__(self) -> bool:
        return not self.known.issuperset(self.hooks)


def make_transparent(model: nn.Module) -> None:
    """Let every component of a bridge that can be stepped over be so, in place."""
    modules, wiring = list(model.modules()), Wiring()
    for module in modules:
        if isinstance(module, BlockBridge):
            wiring.of_block(module)
        if isinstance(module, LazyAttention):
            wiring.of_attention(module)
    blocks: list[TransparentBlock] = []
    for component in modules:
        if isinstance(component, HookPoint):
            component.__class__ = _in_front((Waking,), type(component))
        front = _front(component)
        if front is None:
            continue
        component.__class__ = _in_front((front, Waking), type(component))
        component.__dict__["_replaced"] = {}
        component.__dict__["_listeners"] = tuple(_listeners(component, wiring))
        if isinstance(component, TransparentBlock):
            blocks.append(component)
    for block in blocks:
        attention: Any = block._modules.get("attn")
        eager = wiring.eager.get(attention, False)
        block.__dict__.update(_inside=tuple(_inside(block)), _eager=eager)


@cache
def _in_front(fronts: tuple[type, ...], kind: type) -> type:
    return type(f"{fronts[0].__name__}{kind.__name__}", (*fronts, kind), {})


def _front(component: nn.Module) -> type[Transparent] | None:
    """What a component of this kind becomes; None where it may do more than fire hooks."""
    if not isinstance(component, GeneralizedComponent) or component.name is None:
        return None
    if isinstance(component, QuietNorm):
        return TransparentNorm if type(component).forward is NormalizationBridge.forward else None
    if type(component) in BLOCKS:
        return TransparentBlock
    return Transparent if type(component) in KINDS or isinstance(component, LazyAttention) else None


def _inside(component: Transparent) -> Iterator[tuple[dict[str, Any], dict[str, Transparent]]]:
    """Modules inside, as torch holds them, and those of them that may be left out."""
    waiting: list[Any] = [component.original_component]
    while waiting:
        modules = waiting.pop()._modules
        may = {n: m for n, m in modules.items() if isinstance(m, Transparent)}
        may = {name: child for name, child in may.items() if not child.must_act((), {})}
        if may:
            yield modules, may
        waiting += (child.original_component for child in may.values())
        waiting += (m for m in modules.values() if m and not isinstance(m, GeneralizedComponent))


def _listeners(component: GeneralizedComponent, wiring: Wiring) -> Iterator[Any]:
    """All that is true where a hook would fire in the component: torch's dicts of hooks, mostly."""
    for hooks in _hooks_on(component):
        yield Others(hooks, wiring.known) if wiring.known.intersection(hooks) else hooks
    # an MLP whose projections are passed by fires their hooks itself
    inside = component.submodules.values() if isinstance(component, MLPBridge) else ()
    own = (m for part in (component, *inside) for m in part.children() if isinstance(m, HookPoint))
    for point in (*own, *wiring.points[component]):
        yield from (point._forward_hooks, point._backward_hooks)
    yield component.__dict__["_replaced"]
    attention = component if isinstance(component, LazyAttention) else wiring.forked.get(component)
    if attention is not None:
        yield wiring.eager.setdefault(attention, Eager(attention))


def _hooks_on(module: nn.Module) -> Iterator[Mapping[int, Any]]:
    return (module.__dict__[name] for name in LISTENERS)
