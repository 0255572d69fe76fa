"""ViCrop: which square is cut out, and what the prompt becomes; and tokens that are hidden."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import interp
from interp.intervention.base import InterventionError
from interp.intervention.hide import HideTokens
from interp.intervention.vicrop import RATIOS, ViCrop, around_box, choose_box, square
from interp.model.images import ImageError, image_counts, image_mark, images_of
from interp.tasks import from_examples
from tests import tiny as text_models
from tests.intervention import naive_var
from tests.model import vision_families as vision
from tests.model.vision_families import IMAGE, picture

GENERAL = {"general": "w30 w31"}


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def prompts_of(model):
    mark = image_mark(model)
    rows = [
        {"text": f"w5 {mark} w6 w7 w8", "answer": " w8 w9 w4", "image": picture(0, 32, 32)},
        {"text": f"w3 w4 w9 {mark} w6 w7", "answer": " w8 w9", "image": picture(1, 32, 48)},
    ]
    for row in rows:
        row |= {"char_spans": {"asked": row["text"][-5:]}, "box": [0.7, 0.1, 0.9, 0.3]}
    return from_examples(model, rows)


# Which square


def by_hand(values, size, side):
    """The card's steps in loops: x outside, y inside, the first of equals wins."""
    rows, columns = values.shape
    across, down = size[0] / columns, size[1] / rows
    best = None
    for ratio in RATIOS:
        cells = ((across, columns), (down, rows))
        kx, ky = (max(1, min(int(side * ratio / p + 1e-9), n)) for p, n in cells)
        if kx == columns and ky == rows:
            if ratio == 1:
                return 0, 0, *size
            continue
        sums = {
            (x, y): values[y : y + ky, x : x + kx].sum()
            for x in range(columns - kx + 1)
            for y in range(rows - ky + 1)
        }
        x, y = max(sums, key=sums.get)
        beside = [sums[p] for p in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if p in sums]
        apart = (sums[x, y] - np.mean(beside)) / (kx * ky)
        if best is None or apart > best[0]:
            best = apart, ratio, ((x + kx / 2) * across, (y + ky / 2) * down)
    assert best is not None
    return square(best[2], side * best[1], size)


sizes = st.tuples(st.integers(20, 200), st.integers(20, 200))
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(grids, sizes, st.integers(5, 90), st.integers(0, 99))
def test_the_square_is_the_card_s(grid, size, side, seed):
    values = np.random.default_rng(seed).random(grid)
    found = choose_box(values, size, side)
    assert found == by_hand(values, size, side)
    left, top, right, bottom = found
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert choose_box(7 * values, size, side) == found


@given(sizes, st.integers(0, 5), st.integers(0, 5))
def test_a_hot_patch_is_in_the_square(size, row, column):
    values = np.zeros((6, 6))
    values[row, column] = 1
    left, top, right, bottom = choose_box(values, size, 18)
    x, y = (column + 0.5) * size[0] / 6, (row + 0.5) * size[1] / 6
    assert left - 1 <= x <= right + 1 and top - 1 <= y <= bottom + 1
    if size[0] <= 18 and size[1] <= 18:
        assert (left, top, right, bottom) == (0, 0, *size)
    assert (right - left) * (bottom - top) <= (2 * 18) ** 2 or (right, bottom) == size


def test_edges_of_the_rule():
    assert choose_box(np.ones((6, 6)), (40, 30), 48) == (0, 0, 40, 30)
    # patches that are larger than the square: one of them
    values = np.eye(4)
    assert choose_box(values, (9000, 9000), 336) == choose_box(values * 3, (9000, 9000), 336)
    # nothing stands out: the first ratio, the first window
    assert choose_box(np.ones((6, 6)), (60, 60), 20) == (0, 0, 20, 20)
    # only the middle is covered by the map
    values = np.zeros((2, 2))
    values[0, 1] = 1
    assert choose_box(values, (80, 40), 20, (0.25, 0, 0.75, 1)) == (40, 0, 60, 20)


def test_squares_stay_inside():
    assert square((2, 50), 20, (100, 100)) == (0, 40, 20, 60)
    assert square((50, 50), 300, (100, 80)) == (0, 0, 100, 80)
    assert around_box([0.4, 0.4, 0.6, 0.6], (100, 100), 10) == (40, 40, 60, 60)
    assert around_box([0.4, 0.4, 0.6, 0.6], (100, 100), 50) == (25, 25, 75, 75)


# What the prompt becomes


@pytest.mark.parametrize("method", ["relative_attention", "gradient_attention", "input_gradient"])
def test_a_prompt_gets_a_second_image(family, method):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    edit = ViCrop(method, side=12, **GENERAL)
    for row in prompts:
        before = {key: str(value) for key, value in row.items()}
        new = edit.prepare(row, model)
        assert {key: str(value) for key, value in row.items()} == before
        first, second = new["image"]
        left, top, right, bottom = edit.box(row, model)
        assert np.array_equal(np.array(second), np.array(first)[top:bottom, left:right])
        counts = image_counts(model, [first, second])
        places = [new["spans"][f"image_{n}"] for n in (1, 2)]
        assert [b - a for a, b in places] == counts and "image" not in new["spans"]
        for a, b in places:
            assert set(new["input_ids"][a:b]) == {IMAGE}
        assert new["input_ids"].count(IMAGE) == sum(counts)
        a, b = new["spans"]["asked"]
        assert model.tokenizer.decode(new["input_ids"][a:b]) == row["text"][-5:]
        # as the tokens of its text are, made by the ordinary way
        text = {"text": new["text"], "image": new["image"]}
        assert from_examples(model, [text])["input_ids"][0] == new["input_ids"]


def test_evaluation_is_that_of_the_prompts_so_made(family):
    model = vision.tiny(family)
    prompts, edit = prompts_of(model), ViCrop(side=12, layers=[1], **GENERAL)
    with model.intervene(edit):
        found = interp.evaluate(model, prompts, progress=False)
        written = interp.evaluate(model, prompts, generate=True, progress=False)
    new = from_examples(model, [edit.prepare(row, model) for row in prompts])
    assert found.loss == pytest.approx(interp.evaluate(model, new, progress=False).loss, rel=1e-5)
    again = interp.evaluate(model, new, generate=True, progress=False)
    assert list(written.table["generated"]) == list(again.table["generated"])
    assert found.loss != pytest.approx(interp.evaluate(model, prompts, progress=False).loss)


def test_controls_are_as_large_elsewhere():
    model = vision.tiny("llava")
    row = prompts_of(model)[1]
    squares = {
        where: ViCrop(side=12, where=where, **GENERAL).box(row, model)
        for where in ("map", "random", "center", "given")
    }
    sides = {where: (box[2] - box[0], box[3] - box[1]) for where, box in squares.items()}
    assert sides["map"] == sides["random"] == sides["center"] and sides["given"] == (12, 12)
    left, top, right, bottom = squares["center"]
    assert abs((left + right) - 48) <= 1 and abs((top + bottom) - 32) <= 1
    assert squares["given"] == (32, 0, 44, 12)
    again, other = (
        ViCrop(side=12, where="random", seed=s, **GENERAL).box(row, model) for s in (0, 5)
    )
    assert again == squares["random"] != other


def test_a_small_image_is_given_twice():
    model = vision.tiny("llava")
    row = prompts_of(model)[0]
    new = ViCrop(side=40, **GENERAL).prepare(row, model)
    assert np.array_equal(np.array(new["image"][1]), np.array(new["image"][0]))


def test_it_needs_one_image():
    edit = ViCrop(side=12, **GENERAL)
    with (
        pytest.raises(ImageError, match="takes no images"),
        text_models.tiny("llama").intervene(edit),
    ):
        raise AssertionError("the block was entered")
    model = vision.tiny("llava")
    with pytest.raises(ImageError, match="without an image"):
        edit.prepare({"text": "w5", "input_ids": [5], "spans": {}}, model)
    new = edit.prepare(prompts_of(model)[0], model)
    with pytest.raises(InterventionError, match="2 images"):
        edit.prepare(new, model)
    bare = {**prompts_of(model)[0], "box": None}
    with pytest.raises(InterventionError, match="no column 'box'"):
        ViCrop(where="given").prepare(bare, model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "eyes"}, "one of relative"),
        ({"where": "up"}, "one of map"),
        ({"side": 0}, "1 on"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(settings, said):
    with text_models.unchecked(), pytest.raises(InterventionError, match=said):
        ViCrop(**settings)


def test_saving_keeps_it(tmp_path):
    edits = [ViCrop(), ViCrop("gradient_attention", layers=slice(1, None), side=64)]
    edits += [HideTokens(), HideTokens(["a", "b_*"], layers=[0, 1], when="generated")]
    for n, edit in enumerate(edits):
        edit.save_pretrained(tmp_path / str(n))
        assert interp.load_intervention(tmp_path / str(n)) == edit
    assert len({repr(edit) for edit in edits}) == 4


# Hidden tokens


def hidden_prompts(model) -> Dataset:
    """Of the first prompt two image tokens and one of text are hidden, of the second none."""
    rows = [dict(row) for row in prompts_of(model)]
    start = rows[0]["spans"]["image"][0]
    for name, at in (("hidden_1", start), ("hidden_2", start + 2), ("hidden_3", 0)):
        rows[0]["spans"][name] = [at, at + 1]
    return from_examples(model, rows)


def test_text_looks_away_and_the_image_does_not(family):
    model = vision.tiny(family)
    prompts = hidden_prompts(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    spans = interp.tasks.prompts.spans_of(prompts)
    edit = HideTokens(layers=[0])

    def pattern(*edits):
        with model.intervene(*edits), model.spans(spans):
            return model.read_attention(
                batch.input_ids, lambda a: a.pattern(), layers=[0],
                attention_mask=batch.attention_mask, **batch.inputs,
            )[:, 0]  # fmt: skip

    before, after = pattern(), pattern(edit)
    first = batch.first.tolist()
    start = spans[0]["image"][0]
    columns = [first[0] + at for at in (start, start + 2, 0)]
    expected = before.clone()
    for i in range(first[0], before.shape[2]):
        others = [j for j in range(before.shape[3]) if j not in columns]
        if batch.input_ids[0, i] != IMAGE and before[0, 0, i, others].sum() > 0:
            expected[0, :, i, columns] = 0
            expected[0, :, i] /= expected[0, :, i].sum(-1, keepdim=True)
    real = batch.attention_mask.bool()
    for row in range(2):
        assert_close(after[row][:, real[row]], expected[row][:, real[row]], atol=1e-5, rtol=1e-4)
    assert (after[0] - before[0]).abs().max() > 0.05


def test_tokens_stay_hidden_from_what_is_written(family):
    model = vision.tiny(family)
    prompts = hidden_prompts(model)
    spans = interp.tasks.prompts.spans_of(prompts)
    written = [[5, 9, 21], [8, 7, 33]]

    def steps(some, told, tokens):
        batch = model.batch(some["input_ids"], images=images_of(some))
        with model.intervene(HideTokens()), model.spans(told):
            logits = naive_var.stepped(
                model.original_model, batch.input_ids, batch.attention_mask, batch.inputs, tokens
            )
        return [logits[row, first:] for row, first in enumerate(batch.first.tolist())]

    together = steps(prompts, spans, written)
    for row in range(2):
        alone = steps(prompts.select([row]), [spans[row]], [written[row]])[0]
        assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    if family.startswith("llava"):  # without a cache Qwen numbers answers otherwise
        lists = [[*ids, *more] for ids, more in zip(prompts["input_ids"], written, strict=True)]
        batch = model.batch(lists, images=images_of(prompts))
        lengths = [len(ids) for ids in prompts["input_ids"]]
        with torch.no_grad(), model.intervene(HideTokens()), model.spans(spans, lengths):
            logits = model(batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs)
        for row, first in enumerate(batch.first.tolist()):
            assert_close(logits[row, first:], together[row], atol=1e-4, rtol=1e-4)


def test_hiding_wants_an_image_model_and_told_spans():
    with (
        pytest.raises(ImageError, match="takes no images"),
        text_models.tiny("llama").intervene(HideTokens()),
    ):
        raise AssertionError("the block was entered")
    model = vision.tiny("llava")
    prompts = hidden_prompts(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    with pytest.raises(InterventionError, match="nobody told"), model.intervene(HideTokens()):
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
    with pytest.raises(InterventionError, match="names of spans"):
        HideTokens("*")
