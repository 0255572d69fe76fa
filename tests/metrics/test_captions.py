"""Captions are what the model writes one by one; cut ones have as many words as the others."""

import pytest

import interp
from interp.metrics import MetricError, cut_alike, write_captions
from interp.metrics.captions import n_words
from interp.model.images import image_mark
from interp.tasks import from_examples
from tests.model import vision_families as vision
from tests.model.vision_families import picture


def prompts_of(model):
    mark = image_mark(model)
    rows = [(f"w5 {mark} w6", 16), (f"{mark} w9 w3 w4", 32), (f"w8 w7 {mark} w5", 16)]
    return from_examples(
        model, [{"text": text, "image": picture(n, 16, w)} for n, (text, w) in enumerate(rows)]
    )


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_a_caption_is_what_is_written_to_its_prompt_alone(family, tmp_path):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    found = write_captions(model, prompts, max_new_tokens=4, batch_size=3, progress=False)
    kept = write_captions(
        model, prompts, max_new_tokens=4, batch_size=2, out=tmp_path, progress=False
    )
    assert list(found["caption"]) == list(kept["caption"])
    for row, caption in zip(prompts, found["caption"], strict=True):
        batch = model.batch([row["input_ids"]], images=[row["image"]])
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, 4, **batch.inputs)
        ids = new[0].tolist()
        ids = ids[: ids.index(2)] if 2 in ids else ids
        assert caption == model.tokenizer.decode(ids, skip_special_tokens=True)
    assert [len(t) < 4 for t in found["tokens"]] == list(found["ended"])


def test_interventions_are_at_work():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    before = write_captions(model, prompts, max_new_tokens=4, progress=False)
    with model.intervene(interp.VHR(4.0, layers=(0, 1))):
        after = write_captions(model, prompts, max_new_tokens=4, progress=False)
    assert list(before["caption"]) != list(after["caption"])


def test_captions_are_cut_to_as_many_words():
    captions = ["The image shows a red circle.", "A dog.", "One two three"]
    others = ["There is one.", "A very long one indeed", ""]
    cut = cut_alike(captions, others)
    assert cut == ["The image shows", "A dog.", ""]
    assert n_words("two-part words") == 2
    with pytest.raises(MetricError, match="2 for 3 captions"):
        cut_alike(captions, others[:2])
    with pytest.raises(MetricError, match="max_new_tokens=0"):
        write_captions(vision.tiny("llava"), prompts_of(vision.tiny("llava")), max_new_tokens=0)
