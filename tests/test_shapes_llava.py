"""shapes-llava: its training script packs rows that are each question alone, and what it left.

With a tiny language model in the place of SmolLM2; the script itself is the one that trains.
"""

import json
import random
import runpy
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.stats import binomtest
from torch.testing import assert_close

import interp
from interp import zoo
from interp.model.assembled import put_together
from interp.tasks.scenes import draw_scene
from tests.conftest import ROOT

SCRIPT = ROOT / "data" / "models" / "shapes-llava" / "train.py"
TEMPLATE = (
    "{% for m in messages %}<s> No {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s> Yes {% endif %}"
)


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def tokenizer(script):
    """mini-llava's words; <image> in the place that SmolLM2 keeps for it."""
    made = script.mini.build_tokenizer()
    made.chat_template = TEMPLATE.replace("<s>", "<bos>").replace("</s>", "<eos>")
    return made


@pytest.fixture(scope="module")
def model(script, tokenizer):
    torch.manual_seed(0)
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    language = hf.LlamaForCausalLM(text).requires_grad_(False)
    config = script.build_config(language)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return put_together(config, language)


def batch_of(script, tokenizer, seed: int, phase: int):
    wording = script.Wording(tokenizer)
    return script.draw(random.Random(seed), wording, phase, torch.float32)


@pytest.fixture
def seeds(script, tokenizer):
    """A batch with one picture a scene, and one with two."""
    found = {}
    for seed in range(40):
        found.setdefault(batch_of(script, tokenizer, seed, 3).pixels.shape[1], seed)
    assert set(found) == {1, 2}
    return found


def test_packed_questions_are_each_question_alone(script, tokenizer, model, seeds):
    wording = script.Wording(tokenizer)
    prefix = script.Prefix(model, wording.before)
    image = model.config.image_token_id
    for n_pictures, seed in seeds.items():
        batch = batch_of(script, tokenizer, seed, 3)
        with torch.no_grad():
            logits = model.lm_head(script.hidden_of(model, prefix, batch))
        for scene in range(len(batch.ids)):
            for branch in range(int(batch.branch[scene].max()) + 1):
                own = batch.branch[scene] == branch
                ids = [
                    *wording.before, *[image] * script.N_PATCHES * n_pictures,
                    *batch.ids[scene][own].tolist(),
                ]  # fmt: skip
                with torch.no_grad():
                    alone = model(torch.tensor([ids]), pixel_values=batch.pixels[scene]).logits[0]
                assert_close(logits[scene][own], alone[-int(own.sum()) :], atol=1e-4, rtol=1e-4)


def test_targets_are_the_answers_and_their_end(script, tokenizer, seeds):
    words = {"caption": "The image shows", "exists": ("Yes", "No")}
    for seed in seeds.values():
        batch = batch_of(script, tokenizer, seed, 3)
        for scene in range(len(batch.ids)):
            for branch in range(int(batch.branch[scene].max()) + 1):
                own = batch.branch[scene] == branch
                ids, target = batch.ids[scene][own], batch.target[scene][own]
                asked = target >= 0
                assert target[asked][-1] == tokenizer.eos_token_id
                places = asked.nonzero().flatten()
                assert (ids[places[:-1] + 1] == target[asked][:-1]).all()
                kind = script.KINDS[batch.kind[scene][own][0]]
                answer = tokenizer.decode(target[asked][:-1])
                assert answer.startswith(words.get(kind, ""))
                assert ids[places[0]] == tokenizer("Yes").input_ids[0]  # the template's end


def test_a_closer_look_shows_the_target(script):
    rng = random.Random(0)
    for _ in range(50):
        scene = draw_scene(rng, "training", dots=True)
        shape = rng.choice(scene.shapes)
        left, top, right, bottom = script.around(rng, scene, shape.name)
        assert 0 <= left < right <= 1.0001 and 0 <= top < bottom <= 1.0001
        assert right - left == pytest.approx(bottom - top)
        box = np.array(shape.box)
        assert left <= box[0] + 1e-9 and box[2] <= right + 1e-9
        assert top <= box[1] + 1e-9 and box[3] <= bottom + 1e-9


def test_only_encoder_and_projector_learn(script, tokenizer, model):
    mine = deepcopy(model)
    prefix = script.Prefix(mine, script.Wording(tokenizer).before)
    batch = batch_of(script, tokenizer, 0, 3)
    loss, told = script.answer_loss(mine, prefix, batch, script.WEIGHTS[3])
    loss.backward()
    assert {"caption", "exists", "count"} <= set(told)
    learns = {n.split(".")[1] for n, p in mine.named_parameters() if p.grad is not None}
    assert learns == {"vision_tower", "multi_modal_projector"}
    with_weight = {**script.WEIGHTS[3], "exists": 0.0}
    without, _ = script.answer_loss(mine, prefix, batch, with_weight)
    total = sum(script.WEIGHTS[3].values())
    expected = (without * (total - 2) + 2 * told["exists"][0]) / total
    assert_close(loss, expected.to(loss.dtype), atol=1e-4, rtol=1e-4)


def test_the_projector_starts_with_the_spread_of_embeddings(script, tokenizer, model):
    mine = deepcopy(model)
    rng = random.Random(1)
    pixels = script.mini.pixels_of([draw_scene(rng, "training") for _ in range(8)])
    script.scale_projector(mine, pixels)
    with torch.no_grad():
        out = mine.model.multi_modal_projector(script.mini.features_of(mine, pixels))
    assert_close(out.std(), mine.model.language_model.embed_tokens.weight.std())


def test_the_encoder_alone_is_told_what_lies_in_each_cell(script):
    rng = random.Random(2)
    scenes = [draw_scene(rng, "training", dots=True) for _ in range(20)]
    cells = script.mini.cells_of(scenes)
    classes = script.mini.CLASSES
    for row, scene in enumerate(scenes):
        grid = {name: value[row].view(6, 6) for name, value in cells.items()}
        assert (grid["color"] < 8).sum() == 4 * len(scene.shapes)
        for shape in scene.shapes:
            y, x = int(shape.y * 6), int(shape.x * 6)
            for name in classes:
                assert classes[name][grid[name][y, x]] == getattr(shape, name)


def test_pixels_are_those_of_the_processor(script):
    scenes = [draw_scene(random.Random(seed), "training") for seed in range(3)]
    processor = script.mini.build_processor(script.mini.build_tokenizer())
    want = processor(images=[scene.draw(48) for scene in scenes], return_tensors="pt")
    assert_close(script.mini.pixels_of(scenes), want["pixel_values"], atol=1e-5, rtol=0)


# what was trained


def test_what_is_shipped_is_small_and_names_no_path(script):
    folder = SCRIPT.parent
    assert (folder / "vision.safetensors").stat().st_size < 10 * 2**20
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())["text_config"]
    recorded = json.loads((folder / "evaluation.json").read_text())
    assert script.mini.table(recorded) in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not zoo.SMOLLM2.installed, reason="wants `interp models get smollm2-135m`")
@pytest.mark.parametrize("kind", ["caption", "exists", "color"])
def test_it_does_what_was_recorded(kind):
    recorded = json.loads((SCRIPT.parent / "evaluation.json").read_text())
    model = interp.load("shapes-llava")
    prompts = interp.tasks.scenes(model, 40, seed=99, questions=(kind,))
    right = int(interp.evaluate(model, prompts, progress=False).table["correct"].sum())
    expected = recorded["tasks"][f"{kind}, even scenes"]["accuracy"]
    assert binomtest(right, 40, expected).pvalue > 1e-3
