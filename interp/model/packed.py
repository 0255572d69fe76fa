"""Qwen's vision towers with heads: TransformerLens wraps their attention as one closed box.

Such a tower lays the patches of all images end to end, without a batch axis, and attends within
each image; most layers of Qwen2.5-VL within each window of it. So here

- `hook_q`, `hook_k`, `hook_v` and `hook_z` have a batch axis of one: `[1, patch, head, d_head]`,
  the patches of every image of the pass;
- `hook_attention` fires once for each image (or window), in their order.

TransformerLens also wants torchvision for these families, which only their videos need.
"""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import (
    JointQKVAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.vision_encoder import (
    vision_attention_config,
)
from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import (
    Qwen2_5_VLArchitectureAdapter,
)
from transformer_lens.model_bridge.supported_architectures.qwen3_vl import (
    Qwen3VLArchitectureAdapter,
)
from transformer_lens.model_bridge.supported_architectures.qwen3_vl_moe import (
    Qwen3VLMoeArchitectureAdapter,
)


class PackedHeads(BaseTensorConversion):
    """What hooks see of a sequence without a batch axis, split into heads."""

    splits_attention_heads = True  # TransformerLens then knows which axis counts positions

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def handle_conversion(
        self, input_value: Float[Tensor, "patch width"], *full_context
    ) -> Float[Tensor, "1 patch head d_head"]:
        return input_value.unflatten(-1, (self.n_heads, -1))[None]

    def revert(
        self, input_value: Float[Tensor, "1 patch head d_head"], *full_context
    ) -> Float[Tensor, "patch width"]:
        return input_value[0].flatten(-2)


class PackedAttention(JointQKVAttentionBridge):
    """The attention of one layer of such a tower."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        for hook in (self.q.hook_out, self.k.hook_out, self.v.hook_out, self.o.hook_in):
            hook.hook_conversion = PackedHeads(self.config.n_heads)

    def setup_hook_compatibility(self) -> None:
        """Nothing is left to set up: TransformerLens' own shapes have a batch axis."""


def split_qkv(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The fused projection as three; its outputs are all queries, all keys, all values."""
    fused: Any = attention.qkv
    parts = []
    for weight, bias in zip(fused.weight.chunk(3), fused.bias.chunk(3), strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        part.weight, part.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        parts.append(part)
    return tuple(parts)


class _WithHeads:
    """Mixed into TransformerLens' adapter of such a family."""

    required_libraries: ClassVar[list[str]] = []

    def __init__(self, cfg):
        super().__init__(cfg)
        blocks = self.component_mapping["vision_encoder"].submodules["blocks"]
        blocks.submodules["attn"] = PackedAttention(
            name="attn",
            config=vision_attention_config(self.cfg),
            split_qkv_matrix=split_qkv,
            submodules={"qkv": LinearBridge(name="qkv"), "o": LinearBridge(name="proj")},
        )


class Qwen25VLAdapter(_WithHeads, Qwen2_5_VLArchitectureAdapter):
    """Qwen2.5-VL."""


class Qwen3VLAdapter(_WithHeads, Qwen3VLArchitectureAdapter):
    """Qwen3-VL."""


class Qwen3VLMoeAdapter(_WithHeads, Qwen3VLMoeArchitectureAdapter):
    """Qwen3-VL with experts."""


def register() -> None:
    """Have TransformerLens use these adapters, by its own way of adding some."""
    for name, adapter in (
        ("Qwen2_5_VLForConditionalGeneration", Qwen25VLAdapter),
        ("Qwen3VLForConditionalGeneration", Qwen3VLAdapter),
        ("Qwen3VLMoeForConditionalGeneration", Qwen3VLMoeAdapter),
    ):
        ArchitectureAdapterFactory.register_adapter(name, adapter)
