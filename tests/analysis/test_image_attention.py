"""Attention on images and maps over them, against transformers' own eager attention."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from interp import figures
from interp.analysis.boxes import box_ratio, window_sums
from interp.analysis.general_prompts import general_prompts
from interp.analysis.image_attention import ImageAttentionError, image_attention
from interp.analysis.image_maps import gradient_attention, input_gradient, relative_attention
from interp.analysis.pixels import as_pictures, edges
from interp.heads import HeadError
from interp.model.gradients import GradientError
from interp.model.image_grid import WHOLE, Grid, grid_of
from interp.model.images import ImageError, image_mark, pixel_inputs
from interp.tasks import from_examples
from tests import tiny as text_models
from tests.analysis.image_prompts import plain, prompts_of
from tests.model import vision_families as vision
from tests.model.vision_families import IMAGE, picture

QUIET = {"progress": False, "batch_size": 2}


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


# Shares


def shares(family, model, prompts, row, answer) -> tuple[np.ndarray, np.ndarray]:
    """[layer, head, step] and the mean over the prompt's text behind the image, by loops."""
    out, _ = plain(family, model, prompts, row, answer[:-1])
    ids = [*prompts["input_ids"][row], *answer[:-1]]
    n = len(prompts["input_ids"][row])
    image = [j for j, token in enumerate(ids) if token == IMAGE and j < n]
    text = [i for i in range(image[0], n) if i not in image]
    steps, read = [], []
    for layer in out.attentions:
        held = layer[0, :, :, image].sum(-1)
        steps.append(held[:, n - 1 :])
        read.append(held[:, text].mean(-1))
    return torch.stack(steps).detach().numpy(), torch.stack(read).detach().numpy()


def test_shares_of_answers_are_those_of_the_eager_pattern(family):
    model = vision.tiny(family)
    prompts = prompts_of(model, several=True)
    found = image_attention(model, prompts, **QUIET)
    read = []
    for row, answer in enumerate(prompts["answer_ids"]):
        steps, prompt = shares(family, model, prompts, row, answer)
        np.testing.assert_allclose(found.per_prompt[row], steps, atol=1e-5)
        read.append(prompt)
        assert found.per_prompt[row].shape == (2, 4, len(answer))
    np.testing.assert_allclose(
        found.heads.table["prompt"], np.mean(read, axis=0).reshape(-1), atol=1e-5
    )
    mean = np.mean([steps.mean(2) for steps in found.per_prompt], axis=0)
    np.testing.assert_allclose(found.heads.matrix, mean, atol=1e-6)
    assert found.heads.samples.shape == (4, 8)


def test_shares_while_writing_are_those_of_what_was_written(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    found = image_attention(model, prompts, how="generate", max_new_tokens=4, **QUIET)
    for row in range(len(prompts)):
        n = found.per_prompt[row].shape[2]
        batch = model.batch([prompts["input_ids"][row]], images=[prompts["image"][row]])
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, n, **batch.inputs)
        steps, _ = shares(family, model, prompts, row, new[0].tolist())
        np.testing.assert_allclose(found.per_prompt[row], steps, atol=1e-5)


def test_steps_count_the_prompts_that_have_them_and_know_the_even_share():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    found = image_attention(model, prompts, **QUIET)
    by_step = found.steps.groupby("step")["n"].first().tolist()
    assert by_step == [3, 2, 1]
    first = found.steps[found.steps["step"] == 0]["uniform"].iloc[0]
    assert first == pytest.approx(np.mean([4 / len(ids) for ids in prompts["input_ids"]]))
    assert len(found.by_layer()) == 2 * 3 and "of attention on the image" in repr(found)
    assert found.plot().data and found.plot(step=1).data
    with pytest.raises(ImageAttentionError, match="there are 0-2"):
        found.plot(step=3)


def test_a_killed_run_goes_on(tmp_path):
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    whole = image_attention(model, prompts, **QUIET)
    kept = image_attention(model, prompts, out=tmp_path, **QUIET)
    next((tmp_path / "shards").glob("shard-00001*")).unlink()
    again = image_attention(model, prompts, out=tmp_path, **QUIET)
    for one in (kept, again):
        np.testing.assert_array_equal(one.heads.matrix, whole.heads.matrix)
    assert (tmp_path / "heads.parquet").is_file() and (tmp_path / "steps.parquet").is_file()


# Maps


def test_relative_attention_is_the_ratio_of_eager_rows(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    others = general_prompts(model, prompts, "w30 w31")
    found = relative_attention(model, prompts, general="w30 w31", **QUIET)
    for row in range(len(prompts)):
        start, end = prompts["spans"][row]["image"]
        rows = []
        for some in (prompts, others):
            out, _ = plain(family, model, some, row)
            rows.append(
                torch.stack([layer[0, :, -1, start:end].mean(0) for layer in out.attentions])
            )
        grid = found.grids[row]
        expected = grid.lay_out(rows[0] / rows[1]).detach().numpy()
        np.testing.assert_allclose(found.maps[row], expected, rtol=1e-4)
    np.testing.assert_allclose(found.map(1), found.maps[1].mean(0))
    np.testing.assert_allclose(found.map(1, 1), found.maps[1][1])


def test_the_same_question_twice_is_1_everywhere(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    for values in relative_attention(model, prompts, general=prompts, **QUIET).maps:
        np.testing.assert_allclose(values, 1, atol=1e-5)


def test_gradient_attention_is_autograd_on_the_dense_pattern(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    found = gradient_attention(model, prompts, **QUIET)
    with torch.no_grad():  # which must not matter
        again = gradient_attention(model, prompts, layers=[1], **QUIET)
    for row in range(len(prompts)):
        out, _ = plain(family, model, prompts, row)
        best = out.logits[0, -1].log_softmax(-1).max()
        gradients = torch.autograd.grad(best, out.attentions)
        start, end = prompts["spans"][row]["image"]
        expected = torch.stack(
            [
                (a[0, :, -1, start:end] * g[0, :, -1, start:end].relu()).mean(0)
                for a, g in zip(out.attentions, gradients, strict=True)
            ]
        )
        expected = found.grids[row].lay_out(expected).detach().numpy()
        np.testing.assert_allclose(found.maps[row], expected, atol=1e-6, rtol=1e-3)
        np.testing.assert_allclose(again.maps[row][0], expected[1], atol=1e-6, rtol=1e-3)
        assert expected.max() > 1e-4


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_input_gradients_are_those_of_the_pixels(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    others = general_prompts(model, prompts, "w30 w31")
    found = input_gradient(model, prompts, general="w30 w31", **QUIET)
    for row in range(len(prompts)):
        sizes = []
        for some in (prompts, others):
            out, pixels = plain(family, model, some, row)
            best = out.logits[0, -1].log_softmax(-1).max()
            (gradient,) = torch.autograd.grad(best, pixels)
            sizes.append(gradient.flatten(0, -4)[0].norm(dim=0))
        shown = pixels.detach().flatten(0, -4)[0]
        spread = torch.tensor(model.processor.image_processor.image_std)[:, None, None]
        ratio = sizes[0] / sizes[1] * edges(shown * spread)
        expected = ratio.unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))
        np.testing.assert_allclose(found.map(row), expected, rtol=2e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_patches_are_put_together_as_they_were(family):
    model = vision.tiny(family)
    images = [picture(0), picture(1, 16, 24)]
    packed = pixel_inputs(model, images)["pixel_values"]
    grids = [grid_of(model, image.size, n) for image, n in zip(images, (4, 6), strict=True)]
    mean, std = (torch.tensor(getattr(model.processor, f"image_{k}")) for k in ("mean", "std"))
    shown = as_pictures(model, packed, grids, summed=False)
    for one, image in zip(shown, images, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        expected = (pixels - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(one, expected.float(), atol=1e-5, rtol=1e-5)
    both = as_pictures(model, packed, grids, summed=True)
    torch.testing.assert_close(both[1], 2 * shown[1])


def test_edges_are_where_the_picture_changes():
    picture = torch.full((3, 24, 24), 0.3)
    picture[:, :, 14:] = torch.rand(3, 24, 10)
    found = edges(picture)
    assert found[:, 16:].float().mean() > 0.7 and not found[:, :8].any()


# Boxes and grids


def test_a_map_points_at_the_box_that_holds_it():
    values = np.zeros((6, 6))
    values[1, 4] = 1
    box = (4 / 6, 1 / 6, 5 / 6, 2 / 6)
    assert box_ratio(values, box) == pytest.approx(36)
    assert box_ratio(np.ones((6, 6)), (0.1, 0.2, 0.7, 0.9)) == pytest.approx(1)
    assert box_ratio(values, (0.0, 0.5, 0.2, 0.9)) == 0
    assert np.isnan(box_ratio(values, (1.2, 0.1, 1.5, 0.4)))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_window_sums_are_sums_over_windows(height, width, seed):
    values = np.random.default_rng(seed).random((5, 6))
    found = window_sums(values, height, width)
    assert found.shape == (6 - height, 7 - width)
    for (top, left), total in np.ndenumerate(found):
        own = values[top : top + height, left : left + width].sum()
        assert total == pytest.approx(own)


def test_the_ratio_of_boxes_knows_what_the_processor_cut_off():
    model = vision.tiny("llava")
    grid = grid_of(model, (48, 32), 4)
    assert grid.region == pytest.approx((1 / 6, 0, 5 / 6, 1))
    assert grid.within((1 / 6, 0, 1 / 2, 1)) == pytest.approx((0, 0, 0.5, 1))
    assert grid_of(model, (16, 16), 4).region == WHOLE
    assert grid_of(vision.tiny("qwen3_vl"), (24, 16), 6) == Grid(2, 3)
    assert grid_of(vision.tiny("llava_next"), (24, 16), 16).region == WHOLE
    assert grid_of(model, (16, 16), 5).first == 1
    for family, n in (("llava", 7), ("qwen3_vl", 5)):
        with pytest.raises(ImageError, match=f"the {n} tokens .* on no grid"):
            grid_of(vision.tiny(family), (24, 16), n)


def test_a_table_has_a_ratio_for_each_layer():
    model = vision.tiny("llava")
    found = gradient_attention(model, prompts_of(model), **QUIET)
    boxes = [[0, 0, 0.5, 0.5]] * 3
    table = found.attention_ratio(boxes)
    assert len(table) == 6
    one = table[(table["prompt"] == 0) & (table["layer"] == 1)]["ratio"].item()
    assert one == pytest.approx(found.maps[0][1][0, 0] / found.maps[0][1].mean(), rel=1e-4)
    with pytest.raises(ImageAttentionError, match="1 for 3"):
        found.attention_ratio(boxes[:1])


def test_a_map_is_drawn_over_its_image():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    found = gradient_attention(model, prompts, **QUIET)
    figure = found.plot(prompts, 1, boxes=[(0.1, 0.2, 0.5, 0.6)])
    (cells,) = figure.data
    assert cells.x[0] == pytest.approx(24 / 6) and cells.x[-1] == pytest.approx(24 * 5 / 6)
    assert list(cells.y) == pytest.approx([0, 8, 16])
    assert figure.layout.images[0].source.startswith("data:image/png")
    assert figure.layout.yaxis.range == (16, 0) and len(figure.layout.shapes) == 1
    with text_models.unchecked(), pytest.raises(figures.FigureError, match="a map"):
        figures.overlay(Image.new("RGB", (4, 4)), np.zeros(3))


# Bad input


PASSES = [image_attention, relative_attention, gradient_attention, input_gradient]


@pytest.mark.parametrize("look", PASSES, ids=lambda look: look.__name__)
def test_text_alone_is_refused(look):
    with pytest.raises(ImageError, match="takes no images"):
        look(text_models.tiny("llama"), "w5 w6", progress=False)
    with pytest.raises(ImageError, match="prompt 0: it has no image"):
        look(vision.tiny("llava"), "w5 w6", progress=False)


@pytest.mark.parametrize("look", PASSES[1:], ids=lambda look: look.__name__)
def test_maps_are_of_one_image(look):
    model = vision.tiny("llava")
    with pytest.raises(ImageAttentionError, match="prompt 3: it has 2 images"):
        look(model, prompts_of(model, several=True), progress=False)


def test_what_has_no_meaning_is_refused():
    model = vision.tiny("llava")
    prompts, mark = prompts_of(model), image_mark(model)
    with text_models.unchecked(), pytest.raises(ImageAttentionError, match="one of forced"):
        image_attention(model, prompts, how="read")
    with pytest.raises(ImageAttentionError, match="at least 1"):
        image_attention(model, prompts, how="generate", max_new_tokens=0)
    silent = from_examples(model, [{"text": f"{mark} w5", "image": picture(0)}])
    with pytest.raises(ImageAttentionError, match="0 has no answer"):
        image_attention(model, silent)
    with pytest.raises(HeadError, match="layers: 7"):
        gradient_attention(model, prompts, layers=[7])
    with pytest.raises(ImageAttentionError, match="there are maps of 0, 1"):
        gradient_attention(model, prompts, **QUIET).map(0, 3)
    last = from_examples(model, [{"text": f"w5 {mark}", "image": picture(0)}])
    with pytest.raises(ImageAttentionError, match="nothing is asked behind its image"):
        relative_attention(model, last)
    with pytest.raises(ImageAttentionError, match="2 prompts for 3"):
        relative_attention(model, prompts, general=prompts.select([0, 1]))
    with torch.inference_mode(), pytest.raises(GradientError, match="inference_mode"):
        gradient_attention(model, prompts, progress=False)


def test_a_general_prompt_keeps_what_stands_around_the_question():
    """A chat's markers, which are behind the span `text`."""
    model = vision.tiny("qwen3_vl")
    mark = image_mark(model)
    whole = f"w3 {mark} w6 w7 w8 w9"
    rows = [{"text": whole, "image": picture(0), "char_spans": {"text": f"{mark} w6 w7"}}]
    (row,) = general_prompts(model, from_examples(model, rows), "w30")
    assert model.tokenizer.decode(row["input_ids"][-4:]) == "<|vision_end|> w30 w8 w9"
