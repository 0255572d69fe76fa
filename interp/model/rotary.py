"""How a layer turns queries and keys by their position, so that they can be turned anew.

Rotary positions multiply q_i and k_j by a rotation R(t) of pairs of dimensions, one angle a pair:

    (R(t_i) q_i) . (R(t_j) k_j) = q_i . R(t_j - t_i) k_j

Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864). The angles are those that the model's own
rotary module makes, and its own function applies them (half of the dimensions or all of them,
neighbours or halves), so whatever the model does is what is done and undone here.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from interp.errors import UserError

# Rules that give a position other angles in a longer text: keys in a cache keep older ones.
CHANGING = ("dynamic", "longrope")

# The one line that says that q and k, as wholes, are rotated whatever the layer is; and lines that
# change them afterwards (a norm, a scale), unless it is by the cache.
ROTATES = re.compile(
    r"^ {8}query_states, key_states = apply_rotary_pos_emb\("
    r"query_states, key_states, cos, sin(, unsqueeze_dim=1)?\)$",
    re.MULTILINE,
)
CHANGES = re.compile(r"^ +(query_states|key_states)(, \w+)* = (?!\w+\.update\()", re.MULTILINE)

Angles = tuple[Float[Tensor, "#batch pos half"], Float[Tensor, "#batch pos half"]]


class RotaryError(UserError):
    """Positions that can't be given anew: the layer has no rotation, or one that changes."""


@dataclass(frozen=True, eq=False)
class Made:
    """The angles that a rotary module gave for position ids; `again` asks it for others."""

    module: nn.Module
    angles: Angles
    ids: Int[Tensor, "#batch pos"]
    like: Tensor  # of the dtype that the angles are to have
    args: tuple
    kwargs: dict

    @property
    def kind(self) -> str:
        """Which of its sets of angles, where the module has several."""
        return str(self.kwargs.get("layer_type", self.args[0] if self.args else None))

    @property
    def rule(self) -> str:
        """How the angles come about: "default", "yarn", ..."""
        rule = getattr(self.module, "rope_type", "default")
        return rule.get(self.kind, "default") if isinstance(rule, dict) else rule

    def again(self, ids: Int[Tensor, "batch pos"]) -> Angles:
        # past the module's hooks, which note what it gives
        return self.module.forward(self.like.to(ids.device), ids, *self.args, **self.kwargs)


@dataclass(eq=False)
class Rotations:
    """What each rotary module of a model gave last; shared by the model's attention layers."""

    made: dict[tuple, Made] = field(default_factory=dict)
    _last: "Rotary | None" = None

    def watch(self, model: nn.Module) -> "Rotations":
        """Note what the rotary modules of `model` give from now on."""
        for name, module in model.named_modules():
            wrapped = isinstance(module, GeneralizedComponent)
            if "RotaryEmbedding" in type(module).__name__ and not wrapped:
                module.register_forward_hook(partial(self._note, name), with_kwargs=True)
        return self

    def of(self, function: Callable, angles: Angles, positions: Tensor, real: Tensor) -> "Rotary":
        """A layer's rotation; one object for all that turn alike in a pass."""
        last = self._last
        facts = (function, *angles, positions, real)
        if last is None or any(a is not b for a, b in zip(last.facts, facts, strict=True)):
            last = Rotary(function, angles, tuple(self.made.values()), positions, real)
            self._last = last
        return last

    def _note(self, name: str, module: nn.Module, args: tuple, kwargs: dict, angles) -> None:
        x, ids = (
            args[i] if len(args) > i else kwargs.get(n) for i, n in enumerate(("x", "position_ids"))
        )
        if not isinstance(angles, tuple) or not torch.is_tensor(x) or not torch.is_tensor(ids):
            return
        if ids.dim() != 2 or angles[0].dim() != 3:  # several axes of position (images)
            return
        rest = {n: value for n, value in kwargs.items() if n not in ("x", "position_ids")}
        # a new tensor: a view would keep the whole residual stream
        made = Made(module, angles, ids, x.new_empty(0), args[2:], rest)
        self.made[name, made.kind] = made


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one layer in one pass. Positions count each prompt's own tokens, from 0.

    Which of the `known` rotary modules gave the layer's angles is looked up when somebody asks.
    """

    function: Callable
    angles: Angles
    known: tuple[Made, ...]
    positions: Int[Tensor, "batch query"]
    real_queries: Bool[Tensor, "batch query"]

    @cached_property
    def facts(self) -> tuple:
        """What makes it this one."""
        return (self.function, *self.angles, self.positions, self.real_queries)

    def rotate(
        self, x: Float[Tensor, "batch head *pos d_head"], positions: Int[Tensor, "*at"]
    ) -> Float[Tensor, "batch head *new d_head"]:
        """x before rotation, as it is at `positions`: `[batch pos]`, or one for each vector of x.

        In the latter case the two are broadcast to each other, the width of x aside. float32.
        """
        return self._turned(x, positions, back=False)

    def undo(
        self, x: Float[Tensor, "batch head pos d_head"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch head pos d_head"]:
        """x as it was before it was rotated at `positions`, float32."""
        return self._turned(x, positions, back=True)

    def _turned(self, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        offset = self.offset.to(positions.device)
        ids = positions + offset.reshape(-1, *[1] * (positions.dim() - 1))
        x = x.float()
        if positions.dim() == 2:
            return self._apply(x, ids, back)
        shape = torch.broadcast_shapes(x.shape[:-1], ids.shape)
        flat = x.expand(*shape, -1).reshape(1, 1, -1, x.shape[-1])
        return self._apply(flat, ids.expand(shape).reshape(1, -1), back).view(*shape, -1)

    def _apply(self, x: Tensor, ids: Tensor, back: bool) -> Tensor:
        cos, sin = (angle.float() for angle in self._angles_at(ids))
        if back:  # angles rounded to bf16, or scaled (YaRN), are no rotation quite: divide
            size = cos.square() + sin.square()
            cos, sin = cos / size, -sin / size
        return self.function(x, x[:, :0], cos, sin)[0]

    def _angles_at(self, ids: Int[Tensor, "batch pos"]) -> Angles:
        if not ids.numel():
            return self._made.again(ids)
        first, last = int(ids.min()), int(ids.max())
        if last - first >= ids.numel():
            return self._made.again(ids)
        # most vectors share their position with others: a cosine for each position will do
        every = torch.arange(first, last + 1, device=ids.device)[None]
        cos, sin = self._made.again(every)
        return cos[0][ids - first], sin[0][ids - first]

    @cached_property
    def _made(self) -> Made:
        pairs = ((made, zip(made.angles, self.angles, strict=True)) for made in self.known)
        found = [made for made, angles in pairs if all(_same(*pair) for pair in angles)]
        if not found:
            raise RotaryError(
                "rotate: this layer's cos and sin are none that a rotary module of the model gave "
                "(does a hook on them change them?); positions can't be given anew."
            )
        rule = found[0].rule
        if rule in CHANGING:
            raise RotaryError(
                f"rotate: this model's positions follow the rule {rule!r}, whose angles depend on "
                "how long the text is; positions can't be given anew."
            )
        return found[0]

    @cached_property
    def offset(self) -> Int[Tensor, "batch 1"]:
        """What the model adds to a position: 0, unless padding or something earlier was counted."""
        ids = self._made.ids.to(self.positions.device).expand_as(self.positions)
        difference = torch.where(self.real_queries, ids - self.positions, 0)
        first = self.real_queries.int().argmax(1, keepdim=True)
        offset = difference.gather(1, first)
        if not torch.equal(torch.where(self.real_queries, offset, 0), difference):
            raise RotaryError(
                "rotate: position_ids leave out or repeat numbers within a prompt, so what a "
                "position means there is not known."
            )
        return offset


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours is theirs:
        return True
    return ours.shape == theirs.shape and torch.equal(ours.to(theirs.device), theirs)


@cache
def rotary_function(kind: type) -> Callable | None:
    """The function by which an attention class of transformers rotates q and k, and no more.

    None where there is none, or where the class does something else: rotates parts of q and k by
    itself (GPT-J, Phi), does so in some layers only (SmolLM3), or changes them afterwards (the
    norms of HunYuan), so that what was rotated can't be had back from q and k.
    """
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return None
    rotates = ROTATES.search(source)
    if rotates is None or CHANGES.search(source, rotates.end()):
        return None
    return getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
