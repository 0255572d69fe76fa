"""The shipped vision-language model: transformers loads it, and it does what its card says."""

import json
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoProcessor, LlavaForConditionalGeneration

import interp
from interp.heads import Head
from interp.model.images import images_of
from interp.tasks.pictures import OBJECTS
from interp.tasks.scenes import draw_scene

FOLDER = Path(__file__).parents[1] / "data" / "models" / "mini-llava"
RECORDED = json.loads((FOLDER / "evaluation.json").read_text())
N = 30


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "train.py")))


@pytest.fixture(scope="module")
def model():
    return interp.load("mini-llava")


@pytest.mark.parametrize("kind", ["caption", "exists", "color", "count"])
def test_it_does_what_was_recorded(model, kind):
    prompts = interp.tasks.scenes(model, 2 * N, seed=99, questions=(kind,))
    right = int(interp.evaluate(model, prompts, progress=False).table["correct"].sum())
    recorded = RECORDED["tasks"][f"{kind}, even scenes"]["accuracy"]
    assert binomtest(right, 2 * N, recorded).pvalue > 1e-3


def test_plain_transformers_describes_a_picture(model):
    plain = LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    scene = draw_scene(random.Random(5), held_out=True)
    inputs = processor(images=scene.draw(), text="<image> Describe the image.", return_tensors="pt")
    with torch.no_grad():
        out = plain.generate(**inputs, max_new_tokens=32, do_sample=False)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith("The image shows a") and text.endswith(".")
    assert any(name in text for name in OBJECTS)
    prompts = interp.tasks.from_examples(
        model, [{"text": "<image> Describe the image.", "image": scene.draw()}]
    )
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    new = model.continue_greedily(batch.input_ids, batch.attention_mask, 32, **batch.inputs)
    assert model.tokenizer.decode(new[0], skip_special_tokens=True) == text


def test_its_answers_come_from_the_picture(model):
    """The same questions about other pictures: what was right is right no longer."""
    prompts = interp.tasks.scenes(model, 2 * N, seed=98, questions=("color",))
    shuffled = prompts.select([*range(1, 2 * N), 0])["image"][:]
    others = interp.tasks.from_examples(
        model,
        [
            {"text": row["text"], "answer": row["answer"], "image": image}
            for row, image in zip(prompts, shuffled, strict=True)
        ],
    )
    seen = interp.evaluate(model, prompts, progress=False).accuracy
    assert interp.evaluate(model, others, progress=False).accuracy < seen - 0.3


@pytest.mark.parametrize(("tower", "harm"), [("text", 1.0), ("vision", 0.1)])
def test_attention_of_both_towers_matters(model, tower, harm):
    """The encoder's a little: a patch alone tells most of what lies in it."""
    prompts = interp.tasks.scenes(model, N, seed=97, questions=("caption",))
    before = interp.evaluate(model, prompts, progress=False).loss
    names = [model.hook_of(Head(layer, 0, tower), "hook_z") for layer in range(4)]
    with model.hooks(fwd_hooks=[(name, lambda z, hook: torch.zeros_like(z)) for name in names]):
        assert interp.evaluate(model, prompts, progress=False).loss > before + harm


def test_training_never_shows_what_is_held_out(script):
    tokenizer = script.build_tokenizer()
    for seed in range(5):
        scenes = [draw_scene(random.Random(seed), "training", held_out=False) for _ in range(50)]
        assert not any(scene.held_out for scene in scenes)
    batch = script.draw(random.Random(0), tokenizer)
    assert tokenizer.unk_token_id not in batch.ids
    assert (batch.ids[:, : script.N_PATCHES] == tokenizer.convert_tokens_to_ids("<image>")).all()


def test_its_tokenizer_knows_every_word(model):
    for bias in ("even", "broken"):
        prompts = interp.tasks.scenes(
            model, 40, bias=bias, questions=("caption", "exists", "color", "count", "detail")
        )
        for row in prompts:
            assert model.tokenizer.unk_token_id not in row["input_ids"] + row["answer_ids"]
            assert model.tokenizer.decode(row["answer_ids"]) == row["answer"].strip()


def test_the_loss_in_training_is_that_of_the_prompts(script):
    """The script's shortcut (features once, no mask) says what plain transformers says."""
    plain = LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()
    batch = script.draw(random.Random(3), script.build_tokenizer())
    with torch.no_grad():
        loss, _ = script.answer_loss(plain, batch)
        total = torch.zeros(())
        for row, scene in enumerate(batch.scene):
            ids, weights = batch.ids[row], batch.weights[row]
            ids = ids[: int(weights.nonzero().max()) + 1]
            logits = plain(ids[None], pixel_values=batch.pixels[scene][None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += (losses * weights[1 : len(ids)]).sum()
    torch.testing.assert_close(loss, total / batch.weights.sum(), atol=1e-4, rtol=1e-4)


def test_the_card_gives_the_recorded_numbers(script):
    card = (FOLDER / "README.md").read_text()
    assert script.table(RECORDED) in card
    for row in RECORDED["tasks"].values():
        interval = binomtest(row["right"], row["n"]).proportion_ci(method="wilson")
        assert row["accuracy"] == row["right"] / row["n"]
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval), abs=1e-4)


def test_it_is_small_and_whole(model):
    assert (FOLDER / "model.safetensors").stat().st_size < 5 * 2**20
    assert all(p.isfinite().all() for p in model.original_model.parameters())
    lines = [json.loads(line) for line in (FOLDER / "training.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert {line["phase"] for line in lines} == {1, 2}
