"""Lazy attention: a bridge's attention component that computes no pattern unless somebody looks.

Nearly every model of transformers calls one function per attention layer, with queries and keys
after rotation and after the cache, and z as its result. We register ours under a name of our own,
and let each component delegate to the wrapped module instead of re-implementing it: projections
fire their own hooks, and all that lies between them is fired here, in this order:

    hook_rot_q, hook_rot_k -> hook_attention -> hook_attn_scores -> hook_pattern -> (o) hook_z

With no hook there the layer runs torch's fused kernel. A hook on scores or pattern makes that
layer, and only that one, hold the whole matrix.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import (
    JointQKVAttentionBridge,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from interp.model.attention import Attention
from interp.model.call import Call, Running
from interp.model.edits import EditError
from interp.model.rotary import Rotary, Rotations, rotary_function

IMPLEMENTATION = "interp_lazy"
BETWEEN = ("hook_rot_q", "hook_rot_k", "hook_attention", "hook_attn_scores", "hook_pattern")


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Float[Tensor, "batch query head d_value"], Tensor | None]:
    """What transformers calls in each attention layer of a lazy model."""
    component = module.__dict__.get("_interp_component")
    unfused = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if component is None or not (unfused or component.watched):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return component.attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, attention_function)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def heard(point: HookPoint) -> bool:
    """Does anybody listen? (`has_hooks` asks every hook what it is.)"""
    return bool(point._forward_hooks or point._backward_hooks)


def fired(point: HookPoint, value: Any) -> Any:
    """What a hook point makes of a value."""
    return point(value) if heard(point) else value


class LazyAttention(AttentionBridge):
    """Mixed into a bridge's attention component by `make_lazy`; adds `hook_attention`."""

    hook_attention: HookPoint
    _angle_points: tuple[HookPoint, ...]  # of the rotation's cos and sin
    _eyes: tuple[Mapping, ...]  # torch's hooks on what the fused kernel does not show
    forward_of_bridge: Callable  # what the bridge itself would run
    # modules inside that fire hooks of this component: the torch hook that does it, which hooks
    fires: list[tuple[nn.Module, RemovableHandle, list[HookPoint]]]

    @property
    def watched(self) -> bool:
        """Does anybody look at what the fused kernel does not show?"""
        return any(self._eyes)

    @property
    def must_be_eager(self) -> bool:
        """Is a mode of the bridge on that only its own re-implementation has?"""
        if not self._lazy or self.compatibility_mode:
            return True
        facts = vars(self.config)
        return any(map(facts.get, ("use_attn_result", "use_split_qkv_input", "use_attn_in")))

    def forward(self, *args, **kwargs):
        """hook_in -> the wrapped module -> hook_out; or the bridge's own path where it must."""
        if self.must_be_eager:
            return self._forward_eager(*args, **kwargs)
        own, points = self.__dict__, self._modules  # the bridge would ask whose a name is
        own["_captured_pre_ln_residual"] = None
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = fired(points["hook_in"], kwargs["hidden_states"])
        else:
            args = (fired(points["hook_in"], args[0]), *args[1:])
        rotation = kwargs.get("position_embeddings")
        if rotation is not None and any(map(heard, self._angle_points)):
            kwargs["position_embeddings"] = self._apply_position_embedding_hooks(rotation)
        own["_angles"] = kwargs.get("position_embeddings")
        output = self.original_component(*args, **kwargs)
        first, *rest = output if isinstance(output, tuple) else (output,)
        if isinstance(self, JointQKVAttentionBridge):
            first = self.hook_hidden_states(first)
        first = fired(points["hook_out"], first)
        return (first, *rest) if isinstance(output, tuple) else first

    def _forward_eager(self, *args, **kwargs):
        """The bridge's own re-implementation; `hook_attention` gets its finished pattern."""
        if not self.hook_attention.has_hooks():
            return super().forward(*args, **kwargs)
        handle = self.hook_pattern.add_hook(self._look_at_pattern, prepend=True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            handle.hook.remove()
            self.hook_pattern.fwd_hooks.remove(handle)

    def _look_at_pattern(self, pattern: Tensor, hook: HookPoint) -> Tensor | None:
        attention = attention_of_pattern(pattern, self._running.call)
        edited = self.hook_attention(attention)
        if edited is attention:
            return None
        if type(self).forward_of_bridge is AttentionBridge.forward:
            raise EditError(
                f"hook_attention: {type(self.original_component).__name__} lets nobody edit its "
                "attention, only look at it; edit hook_z or hook_v instead."
            )
        return edited.pattern().to(pattern.dtype)

    def attend(self, module, query, key, value, mask, **kwargs):
        """Fire the hooks between the projections; z, and the pattern where it was made."""
        points = self._modules
        if "hook_rot_q" in points:
            # all keys, cached ones too, so that an edit means the same at every step
            query, key = fired(points["hook_rot_q"], query), fired(points["hook_rot_k"], key)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        n_queries = query.shape[2]
        if mask is None and causal and 1 < n_queries < key.shape[2]:
            key, value = key[:, :, :n_queries], value[:, :, :n_queries]  # an unfilled static cache
        scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        facts = token_facts(self._running.call, query, key)
        attention = Attention(
            query,
            key,
            value,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            mask=mask,
            causal=bool(causal) and n_queries > 1,
            softcap=kwargs.get("softcap"),
            sink_logits=None if sinks is None else sinks.reshape(1, -1, 1),
            rotary=self._rotary(module, facts["positions"], facts["real_queries"]),
            **facts,
        )
        attention = points["hook_attention"](attention)
        if heard(points["hook_attn_scores"]) or heard(points["hook_pattern"]):
            z, pattern = self._through_pattern(attention)
        else:
            z, pattern = attention.output(), None
        return z.transpose(1, 2).contiguous(), pattern

    def _rotary(self, module: nn.Module, positions: Tensor, real: Tensor) -> Rotary | None:
        own = self.__dict__
        angles, rotations = own["_angles"], own["_rotations"]
        if angles is None or rotations is None or not heard(self._modules["hook_attention"]):
            return None  # nothing to turn, or nobody to turn it for
        function = rotary_function(type(module))
        return None if function is None else rotations.of(function, angles, positions, real)

    def _through_pattern(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """z by way of the whole matrix, for hooks on scores and pattern."""
        if self.hook_attn_scores.has_hooks():
            pattern = attention.pattern_of(self.hook_attn_scores(attention.scores()))
        else:
            pattern = attention.pattern()
        pattern = self.hook_pattern(pattern.to(attention.q.dtype))
        values = attention.per_query_head(attention.v)
        return pattern.to(values.dtype) @ values, pattern

    def fire_fused_qkv(self, fused_projection: nn.Module, args: tuple, fused: Tensor) -> Tensor:
        """A fused projection's own hooks do not show q, k and v apart: fire theirs on its parts."""
        for name, columns in self._qkv_columns.items():
            part, columns = self._modules[name], columns.to(fused.device)
            if self.must_be_eager or not any(p.has_hooks() for p in (part.hook_in, part.hook_out)):
                continue
            if part.hook_in.has_hooks():
                value = part(args[0])
            else:
                value = part.hook_out(fused[..., columns])
            fused = fused.index_copy(-1, columns, value)
        return fused

    def fire_normed(self, norm: nn.Module, args: tuple, normed: Tensor, name: str) -> Tensor:
        """QK-norm: hook_q_normed and hook_k_normed see [batch head pos d_head] as in the bridge."""
        hook = self._modules[name]
        # some models norm before they put heads in front of positions, some after: strides tell
        if normed.dim() == 4 and args[0].stride(1) > args[0].stride(2):
            return hook(normed.transpose(1, 2)).transpose(1, 2)
        return hook(normed)


def make_lazy(
    component: AttentionBridge,
    running: Running,
    lazy: bool,
    has_tokens: bool = True,
    rotations: Rotations | None = None,
) -> None:
    """Turn a bridge's attention component into a lazy one, in place.

    With `lazy=False` it keeps its own eager path and only gains `hook_attention`. `has_tokens` is
    False in a tower that sees something else than the call's tokens (an image encoder).
    `rotations`: what the model's rotary modules give, where somebody notes it.
    """
    if not isinstance(component, LazyAttention):
        kind = type(component)
        members = {"forward_of_bridge": kind.forward}
        component.__class__ = type(f"Lazy{kind.__name__}", (LazyAttention, kind), members)
    component.hook_attention = HookPoint().train(component.training)
    component._running, component._lazy = (running if has_tokens else Running()), lazy
    component._rotations, component._angles = (rotations if has_tokens else None), None
    component.fires = []
    names = ("hook_cos", "hook_sin")
    component._angle_points = tuple(
        component._modules[name] for name in names if name in component._modules
    )
    component._eyes = tuple(
        hooks
        for name in BETWEEN
        if (point := component._modules.get(name)) is not None
        for hooks in (point._forward_hooks, point._backward_hooks)
    )
    if not lazy:
        return
    # through __dict__: an attribute that torch does not walk, so that nothing is registered twice
    attention_module(component).__dict__["_interp_component"] = component
    projection = component._modules.get("o")
    if projection is not None and projection.name in component.original_component._modules:
        # a bridge that re-implements attention (GPT-2's) leaves the wrapped module's own in place
        component.original_component._modules[projection.name] = projection
    if isinstance(component, JointQKVAttentionBridge):
        component._qkv_columns = fused_columns(component)
        handle = component.qkv.register_forward_hook(component.fire_fused_qkv)
        parts: list[Any] = [component._modules[name] for name in "qkv"]
        points = [point for part in parts for point in (part.hook_in, part.hook_out)]
        component.fires.append((component.qkv, handle, points))
    for name in ("q", "k"):
        norm, hook = component._modules.get(f"{name}_norm"), f"hook_{name}_normed"
        if norm is not None and hook in component._modules:
            handle = norm.register_forward_hook(partial(component.fire_normed, name=hook))
            component.fires.append((norm, handle, [component._modules[hook]]))


def can_be_lazy(component: AttentionBridge) -> bool:
    """Does the wrapped module call transformers' attention function, just once?"""
    fused = isinstance(component, JointQKVAttentionBridge)
    return (
        attention_module(component) is not None
        and not component.requires_relative_position_bias
        and not component.is_cross_attention
        and (not fused or fused_columns(component) is not None)
    )


def attention_module(component: AttentionBridge) -> nn.Module | None:
    """The module inside the wrapped one that calls transformers' attention function."""
    found = [m for m in component.original_component.modules() if _calls_interface(type(m))]
    return found[0] if len(found) == 1 else None


@cache
def _calls_interface(kind: type) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source at hand
        return False


def fused_columns(component: JointQKVAttentionBridge) -> dict[str, Int[Tensor, " columns"]] | None:
    """Which outputs of a fused projection are q, k and v, found by splitting their own numbers.

    The bridge knows how to split the fused weight; given a weight whose rows are filled with their
    index, it says where each row goes. None where it can't be told.
    """
    fused = component._modules.get("qkv")
    if fused is None:
        return None
    real: Any = fused.original_component
    module: Any = component.original_component
    n_in, n_out = real.weight.shape if isinstance(real, Conv1D) else real.weight.T.shape
    numbers = torch.arange(n_out, dtype=torch.float32)
    standin = Conv1D(n_out, n_in) if isinstance(real, Conv1D) else nn.Linear(n_in, n_out)
    weight = numbers.expand(n_in, n_out) if isinstance(real, Conv1D) else numbers[:, None]
    standin.weight.data = weight.expand(standin.weight.shape).clone()
    standin.bias.data = numbers.clone()
    probe = copy.copy(module)
    probe.__dict__["_modules"] = dict(module._modules) | {fused.name: standin}
    parts = component.split_qkv_matrix(probe)
    columns = [part.weight.detach()[:, 0].long() for part in parts]
    if sorted(torch.cat(columns).tolist()) != list(range(n_out)):
        return None
    return dict(zip("qkv", columns, strict=True))


def token_facts(call: Call | None, query: Tensor, key: Tensor) -> dict[str, Any]:
    """Positions and padding of this layer's queries and keys, from the facts of the call.

    A tower with tokens of its own (an image encoder) has no padding.
    """
    batch, n_queries, n_keys = len(query), query.shape[2], key.shape[2]
    if call is not None and call.n_tokens == n_queries and len(call.real_keys) == batch:
        return call.facts(n_keys, key.device)
    key_positions = torch.arange(n_keys, device=key.device).expand(batch, n_keys)
    real_keys = torch.ones_like(key_positions, dtype=torch.bool)
    return {
        "positions": key_positions[:, -n_queries:],
        "key_positions": key_positions,
        "real_queries": real_keys[:, -n_queries:],
        "real_keys": real_keys,
    }


def attention_of_pattern(
    pattern: Float[Tensor, "batch head query key"], call: Call | None
) -> Attention:
    """An `Attention` whose softmax is `pattern`, for models that make their own.

    Its logits are the pattern's logarithm (q) times the identity (k); what a row lacks to 1 is a
    virtual sink's. It has no values: z stays the model's affair.
    """
    lowest = torch.finfo(torch.float32).min
    pattern = pattern.float().nan_to_num()  # rows of padding, in some models
    logits = pattern.log().clamp_min(lowest)
    missing = (1 - pattern.sum(-1)).clamp_min(0)
    n_keys = pattern.shape[-1]
    identity = torch.eye(n_keys, device=pattern.device).expand(len(pattern), 1, n_keys, n_keys)
    return Attention(
        q=logits,
        k=identity,
        v=identity[..., :0],
        scale=1.0,
        mask=(pattern > 0).any(1, keepdim=True),  # a weight may be 0 on a key that is seen
        causal=False,
        sink_logits=missing.log().clamp_min(lowest),
        **token_facts(call, logits, identity),
    )
