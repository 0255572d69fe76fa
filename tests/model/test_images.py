"""Images go into prompts as Hugging Face puts them there: in batches, one by one, and cached."""

import io
import json
from copy import deepcopy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from interp.evaluation import compare, evaluate
from interp.model import hooked
from interp.model.hooked import load
from interp.model.images import (
    ImageError,
    as_rgb,
    expanded,
    image_counts,
    image_mark,
    image_spans,
    image_token,
    images_of,
    pixel_inputs,
)
from interp.tasks import as_prompts, from_examples
from tests import tiny
from tests.model import vision_families as vision
from tests.model.vision_families import IMAGE, picture

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def prompts_of(model):
    """None, one and two images, of several sizes; the two touch each other where that can be."""
    mark = image_mark(model)
    return from_examples(
        model,
        [
            {"text": f"w5 {mark} w6 w7", "answer": " w8 w9", "image": picture(0)},
            {"text": "w5 w6 w7", "answer": " w8", "image": None},
            {
                "text": f"{mark}{mark} w9",
                "answer": " w5 w6 w7",
                "image": [picture(1, 16, 32), picture(2, 24, 16)],
            },
            {"text": f"w3 w4 w5 w6 {mark} w7", "answer": " w4", "image": picture(3, 16, 24)},
        ],
    )


def alone(model, prompts, row: int, *more: int) -> dict[str, torch.Tensor]:
    """One prompt by the processor's own hand; for Qwen, without one, by its formula."""
    ids = torch.tensor([[*prompts[row]["input_ids"], *more]])
    found = {"input_ids": ids}
    images = prompts[row]["image"]
    if images:
        processor = getattr(model.processor, "image_processor", model.processor)
        found |= dict(processor(images, return_tensors="pt"))
        if "image_grid_thw" in found:
            found["mm_token_type_ids"] = (ids == IMAGE).int()
    return found


# where images stand


def test_a_prompt_has_the_tokens_that_the_processor_would_write():
    for family in ("llava", "llava_next"):
        model = vision.tiny(family)
        for row in prompts_of(model):
            if not row["image"]:
                continue
            want = model.processor(text=row["text"], images=row["image"])["input_ids"][0]
            assert row["input_ids"] == list(want)


def test_qwen_s_images_take_a_token_for_four_patches():
    for family in ("qwen2_5_vl", "qwen3_vl"):
        counts = image_counts(vision.tiny(family), [picture(0), picture(1, 16, 32)])
        assert counts == [(16 // 4) ** 2 // 4, (16 // 4) * (32 // 4) // 4]


def test_what_is_counted_is_what_the_tower_gives(family):
    model, pictures = vision.tiny(family), [picture(0), picture(1, 16, 32), picture(2, 24, 16)]
    counts = image_counts(model, pictures)
    with torch.no_grad():
        inputs = pixel_inputs(model, pictures)
        features = model.original_model.get_image_features(**inputs).pooler_output
    assert counts == [len(one) for one in features]


def test_spans_name_each_image_and_move_along_with_the_text(family):
    model = vision.tiny(family)
    mark = image_mark(model)
    prompts = from_examples(
        model,
        [
            {"text": f"w3 {mark} w4 w5", "char_spans": {"end": "w5"}, "image": picture(0)},
            {
                "text": f"w4 {mark}{mark} w5 w6",
                "char_spans": {"end": "w5 w6", "begin": "w4"},
                "char_span_lists": {"ends": ["w5", "w6"]},
                "image": [picture(1), picture(2, 16, 32)],
            },
        ],
    )
    for row, words in zip(prompts, (["w5"], ["w5", "w6"]), strict=True):
        ids = row["input_ids"]
        start, end = row["spans"]["end"]
        assert model.tokenizer.convert_ids_to_tokens(ids[start:end]) == words
        images = row["image"]  # a list for all, since one prompt has several
        names = ["image_1", "image_2"] if len(words) == 2 else ["image"]
        lengths = []
        for name in names:
            start, end = row["spans"][name]
            assert set(ids[start:end]) == {IMAGE}
            lengths.append(end - start)
        assert lengths == image_counts(model, images) and sum(lengths) == ids.count(IMAGE)
    ends = [[prompts[1]["input_ids"][i] for i in range(*span)] for span in prompts[1]["ends"]]
    assert ends == [[5], [6]]


def test_image_spans_are_the_runs_of_the_token():
    model = vision.tiny("llava")
    rows = [[IMAGE, IMAGE, 3, IMAGE], [3, 4, 5, 6], [3, IMAGE, IMAGE, IMAGE]]
    expected = [[(0, 2), (3, 4)], [], [(1, 4)]]
    assert image_spans(model, rows) == image_spans(model, torch.tensor(rows)) == expected


def test_an_expanded_text_says_where_each_token_went():
    assert expanded([7, 9, 9, 8], 9, [2, 3]) == ([7, 9, 9, 9, 9, 9, 8], [0, 1, 3, 6, 7])


def test_prompts_that_have_all_image_tokens_stay_as_they_are(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    again = from_examples(model, [dict(row) for row in prompts])
    assert again["input_ids"] == prompts["input_ids"]
    assert again["spans"] == prompts["spans"]


# what the model makes of them


def test_a_padded_batch_equals_each_prompt_alone(family):
    model, plain = vision.tiny(family), vision.build(family)
    prompts = prompts_of(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs)
        for row in range(len(prompts)):
            expected = plain(**alone(model, prompts, row)).logits[0]
            assert_close(logits[row, batch.first[row] :], expected, **TOLERANCE)


def test_greedy_generation_with_the_cache_equals_hugging_face_s(family):
    model, plain = vision.tiny(family), vision.build(family)
    prompts = prompts_of(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    new = model.continue_greedily(batch.input_ids, batch.attention_mask, 6, **batch.inputs)
    for row in range(len(prompts)):
        inputs = alone(model, prompts, row)
        with torch.no_grad():
            out = plain.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        written = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert new[row, : len(written)].tolist() == written


def test_the_batches_of_prompts_bring_their_own_images(family):
    model, plain = vision.tiny(family), vision.build(family)
    prompts = prompts_of(model)
    for batch in model.batches(prompts["input_ids"], 3, images=images_of(prompts)):
        logits = model.last_logits(batch.input_ids, batch.attention_mask, 1, **batch.inputs)
        for place, row in enumerate(batch.index.tolist()):
            with torch.no_grad():
                expected = plain(**alone(model, prompts, row)).logits[0, -1:]
            assert_close(logits[place], expected, **TOLERANCE)


def test_evaluation_sees_the_images(family):
    model, plain = vision.tiny(family), vision.build(family)
    prompts = prompts_of(model)
    found = evaluate(model, prompts, batch_size=3, progress=False).table
    for row, prompt in enumerate(prompts):
        answer = prompt["answer_ids"]
        with torch.no_grad():
            logits = plain(**alone(model, prompts, row, *answer[:-1])).logits[0, -len(answer) :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        assert_close(found["loss"][row], float(loss), **TOLERANCE)
        assert found["correct"][row] == (logits.argmax(-1).tolist() == answer)
    assert "image" not in found


def test_generated_answers_are_those_of_the_images(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    new = model.continue_greedily(batch.input_ids, batch.attention_mask, 2, **batch.inputs)
    written = model.tokenizer.batch_decode(new[:, :2], skip_special_tokens=True)
    examples = [
        {"text": row["text"], "image": row["image"], "answer": " " + text}
        for row, text in zip(prompts, written, strict=True)
        if len(text.split()) == 2 and "w" in text
    ]
    assert examples
    found = evaluate(model, from_examples(model, examples), generate=True, progress=False)
    assert found.accuracy == 1
    others = [{**example, "image": None, "text": "w3"} for example in examples]
    assert evaluate(model, from_examples(model, others), progress=False).accuracy < 1


def test_an_image_changes_what_comparisons_find(family):
    model = vision.tiny(family)
    layer = model.attention_layers[-1]

    class Blind:
        def hooks(self, model):
            yield f"blocks.{layer}.attn.hook_z", lambda z, hook: torch.zeros_like(z)

    found = compare(model, prompts_of(model), {"none": [], "blind": Blind()}, progress=False)
    change = found.differences.set_index("metric").loc["loss", "value"]
    assert abs(change) > 1e-4


def test_the_loss_of_a_text_leaves_out_what_is_an_image_s(family):
    model, plain = vision.tiny(family), vision.build(family)
    mark = image_mark(model)
    prompts = from_examples(model, [{"text": f"w5 {mark} w6 w7", "image": picture(0)}])
    loss = evaluate(model, prompts, progress=False).loss
    inputs = alone(model, prompts, 0)
    with torch.no_grad():
        logits = plain(**inputs).logits[0, :-1]
    target = inputs["input_ids"][0, 1:]
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert_close(loss, float(each[target != IMAGE].mean()), **TOLERANCE)


def test_choices_are_read_behind_the_image(family):
    model, plain = vision.tiny(family), vision.build(family)
    mark = image_mark(model)
    example = {"text": f"w5 {mark} w6", "image": picture(0), "answer": " w8"}
    prompts = from_examples(model, [example | {"choices": [" w8", " w9", " w10"]}])
    found = evaluate(model, prompts, progress=False).logit_diff
    with torch.no_grad():
        logits = plain(**alone(model, prompts, 0)).logits[0, -1]
    assert_close(found, float(logits[8] - logits[[9, 10]].max()), **TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_transformer_lens_own_generation_sees_the_image(family):
    model = vision.tiny(family)
    prompts = prompts_of(model).select([0])
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    new = model.continue_greedily(batch.input_ids, batch.attention_mask, 5, **batch.inputs)
    written = generated(model, batch.input_ids, 5, **batch.inputs)
    assert written == new[0, : len(written)].tolist()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_where_transformer_lens_own_generation_would_err_it_is_an_error(family):
    model, plain = vision.tiny(family), vision.build(family)
    prompts = prompts_of(model).select([0])
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    model.continue_greedily(batch.input_ids, batch.attention_mask, 2, **batch.inputs)
    with pytest.raises(ImageError, match="continue_greedily"):
        generated(model, batch.input_ids, 5, **batch.inputs)
    ids = torch.tensor([[5, 6, 7, 8]])
    written = generated(model, ids, 3)  # text, right after images
    with torch.no_grad():
        want = plain.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 4:]
    assert written == want.tolist()


def generated(model, ids, n: int, **inputs) -> list[int]:
    """What TransformerLens' loop writes on."""
    out = model.generate(
        ids, max_new_tokens=n, do_sample=False, verbose=False, return_type="tokens",
        prepend_bos=False, **inputs,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


# processors


def saved(family, folder):
    """A model's folder, as a hub has it."""
    vision.build(family).save_pretrained(folder)
    vision.processor(family).save_pretrained(folder)
    vision.tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_s_processor_is_loaded_with_it(family, tmp_path):
    model, given = load(saved(family, tmp_path)), vision.tiny(family)
    pictures = [picture(0), picture(1, 16, 32)]
    found, want = pixel_inputs(model, pictures), pixel_inputs(given, pictures)
    assert found.keys() == want.keys()
    assert image_counts(model, pictures) == image_counts(given, pictures)
    for name, value in want.items():  # torchvision, where there is one, resizes a bit differently
        assert_close(found[name], value, atol=0.1, rtol=0)


def test_without_torchvision_qwen_s_image_processor_is_enough(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(hooked.AutoProcessor, "from_pretrained", refuse)
    model = load(saved("qwen3_vl", tmp_path))
    assert not hasattr(model.processor, "image_processor")
    assert image_counts(model, [picture(0)]) == [4]


def test_a_text_only_folder_has_no_processor(mini_llama):
    assert load(mini_llama).processor is None


def test_a_whole_processor_brings_its_tokenizer():
    model = load(vision.build("llava"), processor=vision.processor("llava"))
    assert model.tokenizer("w5 <image>").input_ids == [5, IMAGE]


def test_pixels_come_in_the_model_s_dtype():
    inputs = pixel_inputs(vision.fresh("qwen3_vl", torch.bfloat16), [picture(0)])
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["image_grid_thw"].dtype == torch.int64


# images of all kinds


def test_grey_becomes_three_equal_channels():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    pixels = np.asarray(as_rgb(grey))
    assert pixels.shape == (16, 16, 3) and (pixels == pixels[..., :1]).all()
    assert (pixels[..., 0] == np.asarray(grey)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_lies_on_white(mode):
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    if mode == "PA":
        pytest.importorskip("PIL")
        image = image.convert("P")
        image.info["transparency"] = image.getpixel((1, 0))
        assert as_rgb(image).getpixel((1, 0)) == (255, 255, 255)
        return
    found = as_rgb(image.convert(mode))
    assert found.mode == "RGB"
    assert found.getpixel((1, 0)) == (255, 255, 255)
    assert found.getpixel((2, 0)) == (127, 127, 127)
    if mode == "RGBA":
        assert found.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA"])
def test_every_mode_of_eight_bits_goes_in_as_its_rgb(mode, family):
    model = vision.tiny(family)
    image = picture(5).convert(mode)
    found = pixel_inputs(model, [image])["pixel_values"]
    assert_close(found, pixel_inputs(model, [image.convert("RGB")])["pixel_values"])


def test_files_bytes_and_arrays_are_images_too(tmp_path):
    image, stored = picture(6), io.BytesIO()
    image.save(tmp_path / "one.png")
    image.save(stored, format="PNG")
    forms = [
        tmp_path / "one.png",
        str(tmp_path / "one.png"),
        stored.getvalue(),
        {"bytes": stored.getvalue(), "path": None},
        {"bytes": None, "path": str(tmp_path / "one.png")},
        np.asarray(image),
    ]
    for form in forms:
        assert (np.asarray(as_rgb(form)) == np.asarray(image)).all()
    column = np.asarray(image)[..., :1]
    assert (np.asarray(as_rgb(column))[..., 2] == column[..., 0]).all()


def test_a_photograph_s_orientation_is_followed(tmp_path):
    image = picture(7, 16, 24)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.png", exif=exif)
    assert as_rgb(tmp_path / "turned.png").size == (16, 24)


def test_a_data_set_of_texts_and_images_is_prompts(family, tmp_path):
    model = vision.tiny(family)
    mark = image_mark(model)
    for n in range(2):
        picture(n).save(tmp_path / f"{n}.png")
    files = [str(tmp_path / f"{n}.png") for n in range(2)]
    columns = {"text": [f"{mark} w5", f"w6 {mark} w7"], "answer": [" w8", " w9"], "image": files}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    prompts = as_prompts(model, data)
    want = from_examples(
        model,
        [
            {"text": f"{mark} w5", "answer": " w8", "image": picture(0)},
            {"text": f"w6 {mark} w7", "answer": " w9", "image": picture(1)},
        ],
    )
    assert prompts["input_ids"] == want["input_ids"]
    assert evaluate(model, data, progress=False).loss == pytest.approx(
        evaluate(model, want, progress=False).loss
    )


# what cannot be


def test_a_text_only_model_is_told_so():
    model = tiny.tiny("llama")
    for call in (
        lambda: image_spans(model, [[3, 4]]),
        lambda: image_token(model),
        lambda: pixel_inputs(model, [picture(0)]),
        lambda: model.batch([[3, 4]], images=[picture(0)]),
        lambda: from_examples(model, [{"text": "w3", "image": picture(0)}]),
    ):
        with pytest.raises(ImageError, match=r"Llama.*no images.*vision-language.*mini-llava"):
            call()


def test_a_tokenizer_is_not_enough_for_images():
    with pytest.raises(ImageError, match="give the HookedModel"):
        from_examples(vision.tokenizer(), [{"text": "<image> w3", "image": picture(0)}])


def test_a_model_without_a_processor_is_told_so():
    model = load(vision.build("llava"), tokenizer=deepcopy(vision.tokenizer()))
    with pytest.raises(ImageError, match=r"without a processor.*processor="):
        from_examples(model, [{"text": "<image> w3", "image": picture(0)}])


def test_an_image_processor_that_counts_no_tokens_is_told_so():
    part = vision.processor("llava").image_processor
    model = load(vision.build("llava"), tokenizer=deepcopy(vision.tokenizer()), processor=part)
    with pytest.raises(ImageError, match=r"CLIPImageProcessorPil.*AutoProcessor"):
        from_examples(model, [{"text": "<image> w3", "image": picture(0)}])


def test_an_image_that_is_missing_or_not_written_of(family):
    model = vision.tiny(family)
    mark = image_mark(model)
    with pytest.raises(ImageError, match=r"prompt 1: 1 image.*0 times.*write '.*<image>"):
        from_examples(
            model,
            [
                {"text": f"{mark} w3", "image": picture(0)},
                {"text": "w3", "image": picture(0)},
            ],
        )
    with pytest.raises(ImageError, match="prompt 0: 2 image.*1 times"):
        from_examples(model, [{"text": f"{mark} w3", "image": [picture(0), picture(1)]}])
    forgotten = from_examples(model, [{"text": "w5 w6"}, {"text": f"{mark} w3"}])
    with pytest.raises(ImageError, match="prompt 1: it has 1 image tokens and no image"):
        evaluate(model, forgotten, progress=False)


def test_as_many_tokens_as_the_images_want(family):
    model = vision.tiny(family)
    (count,) = image_counts(model, [picture(0)])
    short = [[5], [3] + [IMAGE] * (count - 1) + [4]]
    with pytest.raises(ImageError, match=f"prompt 1: it has {count - 1} .* want {count}"):
        model.batch(short, images=[None, picture(0)])
    with pytest.raises(ImageError, match=f"prompt 7: it has 0 .* want {count}"):
        model.batch([[5]], torch.tensor([7]), images=[picture(0)])


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    model = vision.tiny("llava")
    stored = io.BytesIO()
    picture(0, 64, 64).save(stored, format="PNG")
    broken = {
        "there is no file": str(tmp_path / "none.png"),
        "no image that can be read": b"no image at all",
        "read.*truncated": stored.getvalue()[:2000],
        "damaged": Image.open(io.BytesIO(stored.getvalue()[:2000])),
        "is no image": 3.5,
        "beyond 0 to 255": Image.new("I;16", (4, 4)),
        "give bytes": np.zeros((4, 4, 3)),
    }
    for words, image in broken.items():
        with pytest.raises(ImageError, match=f"prompt 1.*{words}"):
            from_examples(
                model,
                [
                    {"text": "<image> w3", "image": picture(0)},
                    {"text": "<image> w3", "image": image},
                ],
            )


def test_a_file_of_prompts_names_its_images(tmp_path):
    model = vision.tiny("llava")
    files = [str(tmp_path / f"{n}.png") for n in range(2)]
    picture(0).save(files[0])
    rows = [{"text": "<image> w3", "answer": " w4", "image": file} for file in files]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = str(tmp_path / "cache")
    data = datasets.Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=cache)
    with pytest.raises(ImageError, match=r"prompt 1: there is no file .*1\.png"):
        as_prompts(model, data)
    picture(1).save(files[1])
    prompts = as_prompts(model, data)
    assert [image.size for image in prompts["image"]] == [(16, 16)] * 2
    assert evaluate(model, prompts, progress=False).loss > 0


def test_a_stored_image_that_went_missing_is_named(tmp_path):
    model = vision.tiny("llava")
    picture(0).save(tmp_path / "one.png")
    file = str(tmp_path / "one.png")
    rows = {"text": ["<image> w3"], "image": [file], "answer": [" w4"]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "one.png").unlink()
    with pytest.raises(ImageError, match=r"prompt 0: there is no file .*one\.png"):
        as_prompts(model, data)
