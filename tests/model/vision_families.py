"""Tiny random models that see images, each with what reads its images and its own tokenizer.

Words are `w3` ... `w57`; the tokens from 58 on belong to images. Qwen's full processors want
torchvision (for videos), so these two come with an image processor only, as they do for users
without it.
"""

from copy import deepcopy
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from interp.model.hooked import HookedModel, load
from tests.model.families import GROUPED

START, END, IMAGE, VIDEO = 60, 61, 62, 63
TEXT = GROUPED | {"vocab_size": 64}
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
VISUAL = {"<|vision_start|>": START, "<|vision_end|>": END, "<image>": IMAGE, "<video>": VIDEO}
CLIP = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # other than the language model's four
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
    "attention_dropout": 0.0,
}
QWEN = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def llava():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    model = hf.LlavaNextForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.image_newline)
    return model


def qwen2_5_vl():
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = hf.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": MROPE},
        vision_config=QWEN | {"window_size": 16, "fullatt_block_indexes": [1]},
        **TOKENS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    config = hf.Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        vision_config=QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **TOKENS,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


FAMILIES = {f.__name__: f for f in (llava, llava_next, qwen2_5_vl, qwen3_vl)}
FOLDER = TemporaryDirectory(prefix="tiny-vision-tokenizer-")


@cache
def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = SPECIAL | {f"w{i}": i for i in range(3, START)} | VISUAL
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(VISUAL),
    ).save_pretrained(FOLDER.name)
    return hf.PreTrainedTokenizerFast.from_pretrained(FOLDER.name)


def processor(family: str) -> Any:
    """What makes pixels of images, and for the LLaVAs also prompts."""
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    sizes = {"patch_size": 8, "num_additional_image_tokens": 1}
    sizes["vision_feature_select_strategy"] = "default"
    if family == "llava":
        return hf.LlavaProcessor(CLIPImageProcessorPil(**square), deepcopy(tokenizer()), **sizes)
    if family == "llava_next":
        pinpoints = [[16, 32], [32, 16], [32, 32]]
        images = LlavaNextImageProcessorPil(**square, image_grid_pinpoints=pinpoints)
        return hf.LlavaNextProcessor(images, deepcopy(tokenizer()), **sizes)
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=16 * 32
    )


def build(family: str, dtype: torch.dtype = torch.float32):
    """Plain transformers with its own eager attention, the same weights each time."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    model.config.architectures = [type(model).__name__]
    model.set_attn_implementation("eager")
    return model.to(dtype)


def fresh(family: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    """A model that a test may spoil."""
    return load(build(family, dtype), tokenizer=deepcopy(tokenizer()), processor=processor(family))


@cache
def tiny(family: str) -> HookedModel:
    """Shared by all tests: leave it as it is."""
    return fresh(family)


def picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
