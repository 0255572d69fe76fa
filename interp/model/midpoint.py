"""`hook_resid_mid` edits the residual stream, not only what the MLP reads of it.

The bridge places this hook at the entry of the MLP's branch (`ln2.hook_in`), behind the point where
the residual stream has gone its own way: an edit there reaches the MLP and not the sum that follows
it. So that the hook means what it says, whatever it changed is added to the block's output as well.
"""

from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.block import BlockBridge


class MidPoint(HookPoint):
    """A hook point that carries by how much its hooks changed the value past the MLP.

    `ends`: what runs last in the MLP, and the block. Both are listened to from the first hook on:
    until then they run as if nobody was here.
    """

    ends: tuple[nn.Module, nn.Module]
    carries: bool = False
    change: Tensor | None = None
    before_mlp: bool = False

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        if not self.carries:
            self.carries = True
            for module, hook in zip(self.ends, (_mark, _carry), strict=True):
                # through __dict__: an attribute that torch does not walk; copies find their own
                module.__dict__["_interp_mid_point"] = self
                module.register_forward_hook(hook, prepend=True)
        return super().register_forward_hook(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = args[0]
        edited = super().__call__(*args, **kwargs)
        # the very object: nothing changed, or changed in place, which the stream shares
        self.change = None if edited is value else edited - value
        self.before_mlp = False
        return edited


def carry_mid_edits(model: nn.Module) -> None:
    """For every block of a bridge whose MLP reads the residual stream through `hook_resid_mid`."""
    for block in model.modules():
        mlp = block._modules.get("mlp") if isinstance(block, BlockBridge) else None
        point = _mid_point(block) if mlp is not None else None
        if point is None:
            continue
        point.__class__ = MidPoint
        # some blocks have the MLP's layers without a module around them
        last = mlp._modules.get("out", mlp).original_component
        point.ends = (last, block.original_component)


def _mid_point(block: BlockBridge) -> HookPoint | None:
    place = block.hook_aliases.get("hook_resid_mid")
    if not isinstance(place, str):
        return None
    point: Any = block
    for name in place.split("."):
        point = point._modules.get(name)
        if point is None:
            return None
    return point if isinstance(point, HookPoint) else None


def _mark(mlp: nn.Module, args: tuple, output: Any) -> None:
    """The MLP ran after the point (in BERT it runs before, and nothing passes the point by)."""
    point = mlp.__dict__["_interp_mid_point"]
    point.before_mlp = point.change is not None and point.has_hooks()


def _carry(block: nn.Module, args: tuple, output: Any) -> Any:
    point = block.__dict__["_interp_mid_point"]
    change, point.change = point.change, None
    if change is None or not point.before_mlp:
        return output
    stream, *rest = output if isinstance(output, tuple) else (output,)
    stream = stream + change.view_as(stream)  # OPT's MLP takes batch and positions as one
    return (stream, *rest) if isinstance(output, tuple) else stream
