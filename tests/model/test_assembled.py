"""A model put together: the language model as it was, behind an image encoder of ours."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from interp import zoo
from interp.model.assembled import put_together, save_ours, tokenizer_with_image
from interp.model.hooked import load
from interp.model.images import image_mark, images_of
from interp.tasks import from_examples
from tests.model import vision_families as vision
from tests.model.vision_families import picture

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
RESERVED = 62
TEXT = {key: value for key, value in vision.TEXT.items() if key != "vocab_size"}


def language_model(folder, **changes):
    """A tiny Llama with a tokenizer that reserves a token, as SmolLM2's does."""
    torch.manual_seed(1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "vocab_size": 64, **changes})).eval()
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 62)}
    backend = Tokenizer(WordLevel(words | {"<reserved>": RESERVED}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<reserved>"],
    ).save_pretrained(folder)  # fmt: skip
    return model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A known language model, and one of ours that sees with it, called toy-llava."""
    behind, ours = tmp_path / "toy-lm", tmp_path / "models" / "toy-llava"
    language = language_model(behind)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision.CLIP),
        text_config=language.config,
        image_token_id=RESERVED,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(2)
    model = put_together(config, language)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" not in name and "lm_head" not in name:
                weight.normal_(0, 0.5)
    save_ours(model, ours, "toy-lm")
    side = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=side, crop_size=side).save_pretrained(ours)
    monkeypatch.setattr(zoo, "EMBEDDED", tmp_path / "models")
    got = zoo.get

    def get(name: str, progress: bool = True):
        return behind if name == "toy-lm" else got(name, progress)

    monkeypatch.setattr(zoo, "get", get)
    return behind, ours


def test_it_is_the_whole_model_that_its_parts_make(folders):
    behind, ours = folders
    model = load("toy-llava")
    assert model.name == "toy-llava" and image_mark(model) == "<image>"
    language = hf.LlamaForCausalLM.from_pretrained(behind)
    plain = hf.LlavaForConditionalGeneration(hf.LlavaConfig.from_pretrained(ours)).eval()
    plain.model.language_model.load_state_dict(language.model.state_dict())
    plain.lm_head.load_state_dict(language.lm_head.state_dict())
    weights = load_file(ours / "vision.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    plain.load_state_dict({n: v.float() for n, v in weights.items()}, strict=False)
    prompts = from_examples(
        model,
        [
            {"text": "w5 <image> w6", "image": picture(0)},
            {"text": "<image> w6 w7 w8 <image>", "image": [picture(1), picture(2)]},
        ],
    )
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    real = batch.attention_mask.bool()
    positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        ours_say = model(batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs)
        theirs = plain(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions,
            **batch.inputs,
        ).logits  # fmt: skip
    assert_close(ours_say[real], theirs[real], **TOLERANCE)


def test_the_language_model_is_left_as_it_is(folders):
    behind, _ = folders
    model, plain = load("toy-llava"), hf.LlamaForCausalLM.from_pretrained(behind)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_close(model(ids), plain(ids).logits, **TOLERANCE)
        new = model.continue_greedily(ids, torch.ones_like(ids), 5)
        out = plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert new[0].tolist() == out[0, 4:].tolist()


def test_its_folder_is_loaded_as_its_name_is(folders):
    _, ours = folders
    one, other = load("toy-llava"), load(ours, dtype="bfloat16")
    assert other.original_model.dtype == torch.bfloat16
    for name, weight in one.vision_encoder.named_parameters():
        assert_close(other.vision_encoder.get_parameter(name).float(), weight, atol=0, rtol=0.01)
    assert zoo.known_model("toy-llava").language_model == "toy-lm"
    assert zoo.known_model("toy-llava").size.endswith(" MB and toy-lm")


def test_its_own_weights_are_all_that_is_saved(folders):
    behind, ours = folders
    names = {file.name for file in ours.iterdir()}
    assert str(behind) not in (ours / "config.json").read_text()
    assert names == {
        "assembly.json", "config.json", "preprocessor_config.json", "vision.safetensors",
    }  # fmt: skip
    with safe_open(ours / "vision.safetensors", "pt") as opened:
        weights = opened.keys()
    assert all(name.startswith(("model.vision_tower.", "model.multi_")) for name in weights)


def test_a_language_model_that_does_not_fit_is_refused(folders, tmp_path):
    behind, _ = folders
    shutil.rmtree(behind)
    language_model(behind, num_hidden_layers=3)
    with pytest.raises(zoo.ModelError, match="num_hidden_layers is 3.*trained for 2"):
        load("toy-llava")


def test_weights_of_another_encoder_are_refused(folders):
    _, ours = folders
    config = json.loads((ours / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 4
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(zoo.ModelError, match="16 weights are missing and 0 unknown"):
        load("toy-llava")


def test_a_token_that_texts_may_have_stands_for_no_image(folders):
    behind, _ = folders
    with pytest.raises(zoo.ModelError, match="image_token_id=7: no reserved token"):
        tokenizer_with_image(behind, 7)
    tokenizer = tokenizer_with_image(behind, RESERVED)
    assert tokenizer("w5 <image>w6").input_ids == [5, RESERVED, 6]
    assert tokenizer.decode([5, RESERVED, 6], skip_special_tokens=True) == "w5 w6"


def test_it_lies_on_one_device(folders):
    with pytest.raises(zoo.ModelError, match="device_map: toy-llava"):
        load("toy-llava", device_map="auto")
