"""Scenes show what they say, questions have the answers that the objects give."""

import random
from collections import Counter

import numpy as np
import pytest

from interp.evaluation import evaluate
from interp.model.images import ImageError
from interp.tasks import polls, scenes
from interp.tasks.pictures import BACKGROUND, COLORS, OBJECTS, SHAPES, Scene, Shape
from interp.tasks.prompts import PromptError
from interp.tasks.scenes import NUMBERS, PARTNERS, ask, company, draw_scene, frequency
from tests import tiny
from tests.model import vision_families as vision


def some(n: int, bias: str = "even", **options) -> list[Scene]:
    rng = random.Random(7)
    return [draw_scene(rng, bias, **options) for _ in range(n)]


@pytest.fixture(scope="module")
def model():
    return vision.tiny("llava")


# pictures


def test_each_object_is_where_it_is_said_to_be_in_its_colour():
    for scene in some(100):
        pixels = np.asarray(scene.draw(96)).astype(int)
        covered = np.zeros((96, 96), dtype=bool)
        for shape in scene.shapes:
            centre = pixels[int(shape.y * 96), int(shape.x * 96)]
            assert tuple(centre) == COLORS[shape.color]
            left, top, right, bottom = (round(96 * edge) for edge in shape.box)
            covered[top - 1 : bottom + 1, left - 1 : right + 1] = True
        assert (pixels[~covered] == BACKGROUND).all()


def test_shapes_differ_and_have_about_the_same_size():
    drawn = {}
    for shape in SHAPES:
        scene = Scene((Shape("white", shape, 0.5, 0.5, 0.13),))
        drawn[shape] = np.asarray(scene.draw(96))[..., 0] > 128
        assert 150 < drawn[shape].sum() < 600
    for one in SHAPES:
        for other in SHAPES:
            apart = (drawn[one] ^ drawn[other]).sum()
            assert (apart == 0) == (one == other) and (apart == 0 or apart > 60)


def test_objects_are_listed_row_by_row_each_in_a_cell_of_its_own():
    for scene in some(300):
        cells = [(int(shape.y * 3), int(shape.x * 3)) for shape in scene.shapes]
        assert cells == sorted(set(cells)) and 1 <= len(cells) <= 3
        assert len(set(scene.objects)) == len(scene.objects)
        for shape in scene.shapes:
            edges = np.array(shape.box)
            assert (edges > 0).all() and (edges < 1).all()
            assert int(edges[0] * 3) == int(edges[2] * 3) and int(edges[1] * 3) == int(edges[3] * 3)


def test_a_part_of_the_picture_is_what_a_larger_picture_shows_there():
    scene, box = some(1)[0], (0.25, 0.0, 0.75, 0.5)
    part = np.asarray(scene.draw(96, box)).astype(int)
    whole = np.asarray(scene.draw(192).crop((48, 0, 144, 96))).astype(int)
    assert (np.abs(part - whole).max(-1) > 40).mean() < 0.01


def test_dots_are_of_another_colour_and_only_where_asked_for():
    for scene in some(50, dots=True):
        pixels = np.asarray(scene.draw(192))
        for shape in scene.shapes:
            assert shape.dot in COLORS and shape.dot != shape.color
            assert tuple(pixels[int(shape.y * 192), int(shape.x * 192)]) == COLORS[shape.dot]
    assert all(shape.dot is None for scene in some(50) for shape in scene.shapes)


# biases


def test_training_scenes_keep_partners_together():
    drawn = some(6000, "training")
    for name, partner in PARTNERS.items():
        having = [scene.objects for scene in drawn if name in scene.objects]
        assert 400 < len(having) < 800
        assert 0.92 < sum(partner in objects for objects in having) / len(having) < 0.98
    alone = [scene for scene in drawn if "blue square" in scene.objects]
    assert 50 < sum("red circle" not in scene.objects for scene in alone) < 300


def test_broken_scenes_have_one_of_these_and_never_its_partner():
    seen = Counter()
    for scene in some(400, "broken"):
        (name,) = [name for name in scene.objects if name in PARTNERS]
        assert PARTNERS[name] not in scene.objects
        seen[name] += 1
    assert min(seen.values()) > 60


def test_even_scenes_have_all_objects_equally_often():
    counts = Counter(name for scene in some(4000) for name in scene.objects)
    assert set(counts) == set(OBJECTS)
    assert min(counts.values()) > 140 and max(counts.values()) < 270  # 200 on average


def test_what_is_held_out_is_a_set_of_objects_and_a_tenth_of_all():
    drawn = some(3000)
    assert 0.07 < sum(scene.held_out for scene in drawn) / 3000 < 0.13
    for scene in drawn[:100]:
        assert Scene(scene.shapes[::-1]).held_out == scene.held_out
    assert all(scene.held_out for scene in some(50, held_out=True))
    assert not any(scene.held_out for scene in some(50, held_out=False))


# questions


def test_answers_are_what_the_objects_give():
    rng = random.Random(3)
    kinds = Counter()
    for scene in some(500, "broken"):
        for kind in ("exists", "color", "count"):
            asked = ask(rng, scene, kind)
            names = [name.split() for name in scene.objects]
            if kind == "exists":
                present = asked["target"] in scene.objects
                assert asked["answer"] == ("Yes" if present else "No")
                assert bool(asked["lure"]) != present
            elif kind == "count":
                n = sum(shape == asked["target"] for _, shape in names)
                assert asked["answer"] == NUMBERS[n]
            elif asked is None:
                continue
            else:
                assert [c for c, s in names if s == asked["target"]] == [asked["answer"]]
            assert asked["answer"] in asked["choices"]
            assert asked["target"] in asked["question"]
            kinds[kind, asked["answer"]] += 1
    assert abs(kinds["exists", "Yes"] - kinds["exists", "No"]) < 80
    assert all(kinds["count", number] for number in NUMBERS[:3])


def test_lures_are_what_they_are_called():
    rng, seen = random.Random(3), Counter()
    for scene in some(800, "broken"):
        asked = ask(rng, scene, "exists")
        seen[asked["lure"]] += 1
        words = {word for name in scene.objects for word in name.split()}
        if asked["lure"] == "partner":
            assert asked["target"] in [PARTNERS.get(name) for name in scene.objects]
        if asked["lure"] == "near":
            assert words & set(asked["target"].split())
    assert min(seen[lure] for lure in ("partner", "near", "random")) > 50


def test_captions_name_all_objects_in_their_order():
    shapes = [Shape("red", "circle", 0.2, 0.2, 0.1), Shape("orange", "star", 0.5, 0.2, 0.1)]
    assert Scene(tuple(shapes[:1])).caption == "The image shows a red circle."
    assert Scene(tuple(shapes)).caption == "The image shows a red circle and an orange star."
    three = (*shapes, Shape("blue", "cross", 0.8, 0.8, 0.1))
    text = "The image shows a red circle, an orange star and a blue cross."
    assert Scene(three).caption == text
    rng = random.Random(0)
    asked = ask(rng, Scene(three), "count")
    assert asked["question"].startswith("How many ") and "crosss" not in asked["question"]
    assert ask(rng, Scene((shapes[1],)), "exists", "orange star")["question"] == (
        "Is there an orange star in the image?"
    )


# prompts


def test_prompts_have_the_columns_that_metrics_and_maps_want(model):
    prompts = scenes(model, 8, seed=1)
    assert prompts["kind"] == ["caption", "exists", "color", "count"] * 2
    for row in prompts:
        assert row["text"].startswith("<image> ") and row["image"].size == (48, 48)
        start, end = row["spans"]["image"]
        assert (start, end) == (0, 4)
        assert len(row["objects"]) == len(row["boxes"])
        scene = Scene(
            tuple(
                Shape(*name.split(), (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, (b[2] - b[0]) / 2)
                for name, b in zip(row["objects"], row["boxes"], strict=True)
            )
        )
        assert scene.held_out
        difference = np.asarray(scene.draw(48)).astype(int) - np.asarray(row["image"])
        assert np.abs(difference).mean() < 1
        if row["kind"] == "caption":
            assert row["answer"] == f" {scene.caption}" and row["choices"] == []
    assert evaluate(model, prompts, progress=False).by("kind").n.min() == 2


def test_seeds_and_sizes_decide(model):
    one, again, other = (scenes(model, 4, seed=seed) for seed in (0, 0, 1))
    assert one["objects"] == again["objects"] != other["objects"]
    assert [i.tobytes() for i in one["image"]] == [i.tobytes() for i in again["image"]]
    large = scenes(model, 4, seed=0, size=96)
    assert large["objects"] == one["objects"] and large[0]["image"].size == (96, 96)


def test_details_are_asked_where_there_are_dots(model):
    for row in scenes(model, 6, questions=("detail",), size=192):
        box = row["boxes"][row["objects"].index(row["target"])]
        x, y = (int(192 * (box[i] + box[i + 2]) / 2) for i in (0, 1))
        assert row["image"].getpixel((x, y)) == COLORS[row["answer"].strip()]


def test_a_chat_template_is_used_where_there_is_one():
    model = vision.fresh("llava")
    template = "{% for m in messages %}w7 {{ m['content'] }} w8 {% endfor %}"
    model.tokenizer.chat_template = template
    row = scenes(model, 1, questions=("exists",))[0]
    assert row["text"].startswith("w7 <image>\nIs there") and row["text"].endswith(" w8 ")
    assert not row["answer"].startswith(" ")
    plain = scenes(model, 1, questions=("exists",), chat=False)[0]
    assert plain["text"].startswith("<image> Is there")
    other = "USER: {image}\n{question} ASSISTANT:"
    own = scenes(model, 1, questions=("exists",), chat=False, template=other)[0]
    assert own["text"].startswith("USER: <image>\nIs") and own["text"].endswith("? ASSISTANT:")


# polls


def test_polls_are_balanced_and_ask_of_the_same_objects_in_all_splits(model):
    splits = {kind: polls(model, 12, negatives=kind) for kind in ("random", "popular")}
    splits["adversarial"] = polls(model, 12, negatives="adversarial")
    yes = {}
    for kind, prompts in splits.items():
        answers = prompts["answer"]
        assert answers == [" Yes", " No"] * (len(prompts) // 2)
        yes[kind] = [row["text"] for row in prompts if row["answer"] == " Yes"]
        for row in prompts:
            assert (row["target"] in row["objects"]) == (row["answer"] == " Yes")
            assert row["lure"] == ("" if row["answer"] == " Yes" else kind)
        for number in set(prompts["scene"]):
            targets = [row["target"] for row in prompts if row["scene"] == number]
            assert len(set(targets)) == len(targets) == 2 * len(targets) // 2
    assert yes["random"] == yes["popular"] == yes["adversarial"]


def test_popular_is_frequent_and_adversarial_is_the_missing_partner(model):
    most = [name for name, _ in frequency().most_common(4)]
    assert set(most) == set(PARTNERS.values())
    assert all(company()[name].most_common(1)[0][0] == p for name, p in PARTNERS.items())
    popular = polls(model, 12, negatives="popular", bias="broken")
    assert all(row["target"] in most for row in popular if row["lure"])
    adversarial = polls(model, 12, negatives="adversarial", bias="broken")
    asked = {}
    for yes, no in zip(adversarial.select(range(0, len(adversarial), 2)), adversarial.select(
        range(1, len(adversarial), 2)), strict=True):  # fmt: skip
        asked[yes["target"]] = no["target"]
    assert all(asked[name] == PARTNERS[name] for name in asked if name in PARTNERS)


# what cannot be


def test_what_cannot_be_asked_is_named(model):
    with pytest.raises(PromptError, match="n=0"):
        scenes(model, 0)
    with pytest.raises(PromptError, match="bias='odd'.*training, even, broken"):
        scenes(model, 1, bias="odd")
    with pytest.raises(PromptError, match="'size'.*caption"):
        scenes(model, 1, questions=("size",))
    with pytest.raises(PromptError, match="negatives='none'.*popular"):
        polls(model, 1, negatives="none")
    with pytest.raises(ImageError, match="no images.*mini-llava"):
        scenes(tiny.tiny("llama"), 1)
