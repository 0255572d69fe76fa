"""A vision-language model put together from ours and another's: a language model as it was
published, and in front of it an image encoder and a projector that we trained.

Its folder has `config.json` (of the whole), `vision.safetensors` (encoder and projector),
`preprocessor_config.json` (how images become pixels) and `assembly.json`, which names the language
model. That one is taken from where `interp models get` put it, and is not changed: a token that its
tokenizer reserves and no text has, `image_token_id`, stands for images and is written `<image>`.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from interp.zoo import ASSEMBLY, ModelError

WEIGHTS = "vision.safetensors"
OURS = ("model.vision_tower.", "model.multi_modal_projector.")
IMAGE = "<image>"
MUST_AGREE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


class Assembled(NamedTuple):
    """The model, and what reads its texts and images."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    processor: Any


def assemble(folder: Path, language_model: Path, dtype: torch.dtype | None = None) -> Assembled:
    """The model of `folder`, its language model read from another. `dtype`: default as stored.

    Raises `ModelError` where the two do not fit, or the folder's weights are not all there.
    """
    config = LlavaConfig.from_pretrained(folder)
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype or "auto")
    model = put_together(config, language)
    weights = load_file(folder / WEIGHTS)
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name.startswith(OURS)]
    if missing or unknown:
        raise ModelError(
            f"{folder / WEIGHTS}: {len(missing)} weights are missing and {len(unknown)} unknown "
            f"(first: {[*missing, *unknown][0]}); it is of another config.json."
        )
    tokenizer = tokenizer_with_image(language_model, config.image_token_id)
    images = AutoImageProcessor.from_pretrained(folder)
    return Assembled(model, tokenizer, processor_for(config, images, tokenizer))


def put_together(config: LlavaConfig, language: PreTrainedModel) -> LlavaForConditionalGeneration:
    """`language` behind a new encoder and projector, in its dtype, for evaluation.

    Raises `ModelError` where `language` is none that the config describes.
    """
    for name in MUST_AGREE:
        wanted, found = getattr(config.text_config, name), getattr(language.config, name)
        if wanted != found:
            raise ModelError(
                f"language_model: its {name} is {found}, and the image encoder was trained for "
                f"{wanted}; get the one that assembly.json names."
            )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    # made anew: on the meta device their buffers would have no values
    model.model.vision_tower = AutoModel.from_config(config.vision_config)
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.model.language_model, model.lm_head = language.model, language.lm_head
    model.generation_config = language.generation_config
    model.config.architectures = [type(model).__name__]
    return model.to(language.dtype).eval()


def save_ours(model: LlavaForConditionalGeneration, folder: Path, language_model: str) -> None:
    """What `assemble` reads, but for how images become pixels: encoder and projector in half."""
    state = model.state_dict()
    ours = {name: state[name].half().contiguous() for name in state if name.startswith(OURS)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(ours, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.text_config._name_or_path = ""  # it would be a path of this machine
    model.config.save_pretrained(folder)
    about = {"format": "interp.assembly", "version": 1, "language_model": language_model}
    (folder / ASSEMBLY).write_text(json.dumps(about, indent=1) + "\n")


def tokenizer_with_image(folder: Path, image_token: int) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, its token `image_token` written `<image>`.

    Raises `ModelError` where that token is none of its reserved ones: text could have it.
    """
    plain = AutoTokenizer.from_pretrained(folder)
    content = json.loads(plain.backend_tokenizer.to_str())
    reserved = [token for token in content["added_tokens"] if token["id"] == image_token]
    if not reserved:
        raise ModelError(f"image_token_id={image_token}: no reserved token of {folder}.")
    word, vocabulary = reserved[0]["content"], content["model"]["vocab"]
    reserved[0]["content"] = IMAGE
    vocabulary[IMAGE] = vocabulary.pop(word)
    with TemporaryDirectory(prefix="interp-tokenizer-") as changed:
        plain.save_pretrained(changed)
        (Path(changed) / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return AutoTokenizer.from_pretrained(changed)


def processor_for(config: LlavaConfig, images: Any, tokenizer: Any) -> LlavaProcessor:
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token
        chat_template=tokenizer.chat_template,
    )
