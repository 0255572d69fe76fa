"""Constant additions to attention's output, written into the weights of a plain model.

What is added to the output of every layer's attention at every token is a bias of its output
projection. Where the architecture has none there, it is asked for in the config
(`attention_bias=True` for Llama and most of its kin), so that the folded model comes back whole
from disk: a bias that was only put on the module is dropped on reload. That setting makes biases of
q, k and v as well, which are zero. Architectures whose config has no such word (Mistral, Qwen2,
Phi-3) cannot hold the bias, and are refused.
"""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.errors import UserError
from interp.model.graph import output_weights
from interp.model.hooked import HookedModel

WRAPPED = "._original_component"


class FoldError(UserError):
    """An edit that no weights can hold, or not those of this architecture."""


def fold_offsets(
    model: HookedModel, vectors: dict[int, Float[Tensor, "head d_head"]]
) -> PreTrainedModel:
    """A plain copy of the model in which each layer's heads say `vectors[layer]` more, always.

    `model` stays as it is. The copy is a Hugging Face model like the one that was loaded: save it
    with `save_pretrained`, or hand it to `interp.load(copy, tokenizer)`.

    Raises `FoldError` where the architecture has no bias to fold into.
    """
    projections = {layer: model.blocks[layer].attn.o.original_component for layer in vectors}
    copy = plain_copy(model, biased=any(p.bias is None for p in projections.values()))
    for layer, added in vectors.items():
        weight, _ = output_weights(model, layer, len(added))
        # double: the sum over heads should not lose what the weights' own type rounds away
        written = torch.einsum("hd,hde->e", added.to(weight.device).double(), weight.double())
        bias = _place_of(model, projections[layer], copy).bias
        if bias is None:
            raise _no_place(model, f"layer {layer}'s output projection")
        bias.data = (bias.data.double() + written.to(bias.device)).to(bias.dtype)
    return copy


def plain_copy(model: HookedModel, *, biased: bool = False) -> PreTrainedModel:
    """The Hugging Face model that is inside, unhooked; `biased`: with biases in its attention.

    Raises `FoldError` where its config does not provide for them, or its weights were processed.
    """
    wrapped = model.original_model
    if getattr(model, "compatibility_mode", False):
        raise FoldError(
            "fold: the weights were processed (compatibility mode), so the plain model's are not "
            "what runs; load the model anew."
        )
    config = deepcopy(wrapped.config)
    if biased:
        if not hasattr(config, "attention_bias"):
            raise _no_place(model, "attention")
        config.attention_bias = True
    config._attn_implementation = None  # what transformers would choose
    config.output_attentions = False  # the bridge asks for them; a config that does is not saved
    copy = type(wrapped)._from_config(config, dtype=wrapped.dtype).to(wrapped.device)
    _fill(model, copy)
    if wrapped.generation_config is not None:
        copy.generation_config = deepcopy(wrapped.generation_config)
    return copy.eval()


@torch.no_grad()
def _fill(model: HookedModel, copy: PreTrainedModel) -> None:
    """The wrapped model's weights; biases that it lacks are zero."""
    # the bridge registers some weights a second time under names of its own: the copy's count
    found = {
        name.replace(WRAPPED, ""): value
        for name, value in model.original_model.state_dict().items()
    }
    for name, value in copy.state_dict().items():
        if name in found:
            value.copy_(found[name])
        elif name.endswith(".bias"):
            value.zero_()
        else:
            raise _no_place(model, name)


def _place_of(model: HookedModel, projection: nn.Module, copy: PreTrainedModel) -> nn.Module:
    """The module of the copy that stands where `projection` does."""
    modules = dict(copy.named_modules())
    for name, module in model.original_model.named_modules(remove_duplicate=False):
        plain = name.replace(WRAPPED, "")
        if module is projection and plain in modules:
            return modules[plain]
    raise _no_place(model, "an output projection")


def _no_place(model: HookedModel, what: str) -> FoldError:
    kind = type(model.original_model).__name__
    return FoldError(
        f"fold: {kind} has no place for a bias of {what}, or loses it on the way to disk; apply "
        "the intervention with model.intervene(...) instead."
    )
