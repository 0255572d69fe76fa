"""VHD and T-VHD: formulas by hand, then whole runs against plain models read token by token."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import interp
from interp import cli
from interp.analysis.divergence import (
    divergence,
    lower_half,
    outliers,
    token_divergence,
    upper_half,
)
from interp.analysis.vision_heads import (
    DivergenceError,
    compare_passes,
    offsets,
    vision_head_divergence,
)
from interp.metrics import Vocabulary, chair
from interp.model.image_free import hidden, spans_without_images, without_images
from interp.model.images import ImageError, image_mark, images_of
from interp.runs import RunError
from interp.tasks import SpanError, from_examples
from tests import tiny
from tests.model import families
from tests.model import vision_families as vision
from tests.model.seen_by_hand import heads_of, inputs_of, plain, step_by_step, text_of
from tests.model.vision_families import END, IMAGE, START, picture

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def prompts_of(model):
    """Images of several sizes, at several places; answers of several lengths."""
    mark = image_mark(model)
    return from_examples(
        model,
        [
            {"text": f"w5 {mark} w6 w7", "answer": " w8 w9", "image": picture(0)},
            {"text": f"{mark} w9", "answer": " w5 w6 w7 w8", "image": picture(1, 16, 32)},
            {"text": f"w3 w4 w5 w6 {mark} w7", "answer": " w4", "image": picture(3, 16, 24)},
        ],
    )


# the formulas


def upper_half_by_hand(distance, activity) -> list[bool]:
    """Equations 6 and 7, a number at a time."""

    def bound(values):
        mean = sum(values) / len(values)
        return mean + (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5

    left = [
        0 if d > bound(distance) and a > bound(activity) else d for d, a in zip(distance, activity)
    ]
    middle = float(np.median(left))
    return [d > middle for d in left]


@given(n=st.integers(2, 9), seed=st.integers(0, 99))
def test_the_upper_half_is_that_of_the_equations(n, seed):
    generator = torch.Generator().manual_seed(seed)
    distance, activity = torch.rand(2, n, generator=generator, dtype=torch.float64) ** 4
    expected = upper_half_by_hand(distance.tolist(), activity.tolist())
    assert upper_half(distance.float(), activity.float()).tolist() == expected
    assert sum(expected) == n // 2  # all different
    plain_half = upper_half(distance.float())
    assert plain_half.sum() == lower_half(distance.float()).sum() == n // 2
    assert not (plain_half & lower_half(distance.float())).any()


def test_an_outlier_says_more_without_the_image_and_is_not_chosen():
    distance, activity = torch.tensor([1.0, 2, 9, 3]), torch.tensor([1.0, 1, 9, 1])
    assert outliers(distance, activity).tolist() == [False, False, True, False]
    assert upper_half(distance, activity).tolist() == [False, True, False, True]
    assert upper_half(distance).tolist() == [False, False, True, True]
    assert not outliers(distance, torch.tensor([9.0, 1, 1, 1])).any()  # it must be the same head


def test_where_nothing_differs_no_head_is_chosen():
    zeros = torch.zeros(2, 5)
    for chosen in (upper_half(zeros, zeros), upper_half(zeros), lower_half(zeros)):
        assert not chosen.any()


def test_distances_are_euclidean_and_activity_is_squared():
    found = divergence(torch.tensor([[3.0, 4], [1, 0]]), torch.tensor([[0.0, 0], [-2, 0]]))
    assert_close(found.distance, torch.tensor([5.0, 3]))
    assert_close(found.relative, torch.tensor([1.0, 1]))
    assert_close(found.activity, torch.tensor([0.0, 4]))
    same = divergence(torch.zeros(2, 3), torch.zeros(2, 3))
    assert same.relative.tolist() == [0, 0]


def test_t_vhd_adds_up_the_largest_of_each_layer():
    """Not the largest of all layers, and no mean."""
    distance = torch.tensor([[[[1.0, 3, 2], [10, 20, 30]]]])
    assert token_divergence(distance)[0, 0].tolist() == [33, 55, 66]


# whole runs


@pytest.mark.parametrize("row", range(3))
def test_scores_are_those_of_a_plain_model_written_token_by_token(family, row):
    """In one batch, padded, in one pass: against one prompt with its cache, eager attention."""
    model, plainly = vision.tiny(family), plain(family)
    prompts = prompts_of(model)
    answers = prompts["answer_ids"][:]
    found = compare_passes(model, prompts, answers)
    n = len(answers[row])
    with_image, _ = step_by_step(plainly, inputs_of(family, prompts, row), answers[row])
    without, _ = step_by_step(plainly, text_of(prompts, row), answers[row])
    for step in range(n):
        for layer in range(2):
            one, other = with_image[step][layer], without[step][layer]
            distance, activity = (one - other).norm(dim=-1), other.norm(dim=-1) ** 2
            at = row, -n + step, layer
            assert_close(found.distance[at], distance, **TOLERANCE)
            assert_close(found.activity[at], activity, **TOLERANCE)
            relative = distance / (one.norm(dim=-1) + other.norm(dim=-1))
            assert_close(found.relative[at], relative, **TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_hidden_image_is_one_that_no_text_can_see(family):
    """Against plain transformers with a mask of its own, positions as they are."""
    model, plainly = vision.tiny(family), plain(family)
    prompts = prompts_of(model)
    answers = prompts["answer_ids"][:]
    found = compare_passes(model, prompts, answers, "masked")
    for row, answer in enumerate(answers):
        inputs = inputs_of(family, prompts, row, *answer[:-1])
        ids = inputs["input_ids"][0]
        size = len(ids)
        mask = torch.full((size, size), -torch.inf)
        for query in range(size):
            for key in range(query + 1):
                if not (ids[key] == IMAGE and ids[query] != IMAGE):
                    mask[query, key] = 0
        one = heads_of(plainly, inputs)
        other = heads_of(plainly, inputs, attention_mask=mask[None, None])
        for layer in range(2):
            n = len(answer)
            expected = (one[layer] - other[layer])[-n:].norm(dim=-1)
            assert_close(found.distance[row, -n:, layer], expected, **TOLERANCE)


def test_a_hidden_image_can_be_any(family):
    """What is compared with does not depend on the pixels; nothing else changes."""
    model = vision.tiny(family)
    prompts = prompts_of(model)
    other = from_examples(
        model,
        [
            {k: row[k] for k in ("text", "answer")}
            | {"image": picture(9 + n, *row["image"].size[::-1])}
            for n, row in enumerate(prompts)
        ],
    )
    one, two = (
        compare_passes(model, p, prompts["answer_ids"][:], "masked") for p in (prompts, other)
    )
    assert_close(one.activity[:, -1], two.activity[:, -1], **TOLERANCE)
    assert (one.distance[:, -1] - two.distance[:, -1]).abs().max() > 1e-2
    shifted = compare_passes(model, prompts, prompts["answer_ids"][:], "deleted")
    gap = one.activity[:, -1] - shifted.activity[:, -1]
    assert gap.abs().max() > 1e-3  # positions are another matter


def test_without_an_image_there_is_no_divergence(family):
    model = vision.tiny(family)
    prompts = from_examples(model, [{"text": "w5 w6 w7", "image": None}, {"text": "w8 w9"}])
    found = compare_passes(model, prompts, [[5, 6], [7]])
    assert not found.distance.any()


def test_the_first_layer_asks_the_same_with_and_without():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    asked = {}

    def keep(q, hook):
        asked.setdefault(len(asked), q[:, -1])

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_q", keep)]):
        compare_passes(model, prompts, [[5], [6], [7]])
    assert_close(asked[0], asked[1])


def test_heads_in_another_order_have_their_scores_in_it():
    model, turned = vision.tiny("llava"), vision.build("llava")
    groups = torch.tensor([2, 3, 0, 1])  # two heads share keys and values
    with torch.no_grad():
        for layer in turned.model.language_model.layers:
            part = layer.self_attn
            for name, order in (("q", groups), ("k", [1, 0]), ("v", [1, 0])):
                weight = getattr(part, f"{name}_proj").weight
                by_head = weight.unflatten(0, (len(order), -1))
                weight.copy_(by_head[order].flatten(0, 1).clone())
            weight = part.o_proj.weight
            weight.copy_(weight.unflatten(1, (4, -1))[:, groups].flatten(1).clone())
    other = interp.load(turned, tokenizer=model.tokenizer, processor=model.processor)
    prompts = prompts_of(model)
    one, two = (compare_passes(m, prompts, prompts["answer_ids"][:]) for m in (model, other))
    assert_close(one.distance[:, -1:, :, groups], two.distance[:, -1:], **TOLERANCE)


def test_what_is_written_is_read_as_it_was_written(family):
    model = vision.tiny(family)
    prompts = prompts_of(model).remove_columns(["answer", "answer_ids"])
    found = vision_head_divergence(model, prompts, max_new_tokens=3, progress=False)
    for prompt, caption in enumerate(found.captions):
        batch = model.batch([prompts[prompt]["input_ids"]], images=[prompts[prompt]["image"]])
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, 3, **batch.inputs)
        assert caption == model.tokenizer.decode(new[0], skip_special_tokens=True)
        rows = found.tokens[found.tokens["prompt"] == prompt]
        assert rows["step"].tolist() == list(range(len(rows)))
        for row in rows.itertuples():
            if row.token not in vision.SPECIAL | vision.VISUAL:
                assert caption[row.start : row.end].strip() == row.token


def test_batches_shards_and_one_by_one_agree(tmp_path):
    model = vision.tiny("llava_next")
    prompts = prompts_of(model)

    def measure(size, **options):
        return vision_head_divergence(
            model, prompts, how="forced", batch_size=size, progress=False, **options
        )

    alone, together = measure(1), measure(3)
    kept = measure(2, out=tmp_path)
    again = measure(2, out=tmp_path)
    for found in (together, kept, again):
        pd.testing.assert_frame_equal(alone.heads.table, found.heads.table, atol=1e-5)
        assert found.captions == alone.captions == ["w8 w9", "w5 w6 w7 w8", "w4"]
        by_k = (np.stack(f.tokens["by_k"].to_list()) for f in (alone, found))
        np.testing.assert_allclose(*by_k, atol=1e-4)
    assert interp.HeadScores.load(tmp_path / "heads.parquet").metadata["k"] == 1
    with pytest.raises(RunError, match="reference"):
        measure(2, out=tmp_path, reference="masked")


def test_the_table_holds_means_over_tokens_and_prompts():
    model = vision.tiny("qwen2_5_vl")
    prompts = prompts_of(model)
    found = vision_head_divergence(model, prompts, how="forced", progress=False, k=2)
    parts = compare_passes(model, prompts, prompts["answer_ids"][:])
    lengths = [2, 4, 1]
    by_prompt = [parts.distance[row, -n:].mean(0) for row, n in enumerate(lengths)]
    assert_close(torch.tensor(found.heads.matrix).float(), torch.stack(by_prompt).mean(0))
    assert found.heads.samples.shape == (3, 8)
    shares = [
        outliers(parts.distance[row, -n:], parts.activity[row, -n:]).float().mean(0)
        for row, n in enumerate(lengths)
    ]
    table = found.heads.table
    first = [
        upper_half(parts.distance[row, -n], parts.activity[row, -n]).float()
        for row, n in enumerate(lengths)
    ]
    for name, values in (("outlier", shares), ("chosen", first)):
        expected = torch.stack(values).mean(0).flatten().numpy()
        np.testing.assert_allclose(table[name], expected, atol=1e-6)
    expected = token_divergence(parts.distance)
    row = found.tokens.query("prompt == 1 and step == 2").iloc[0]
    assert_close(torch.tensor(row["by_k"]), expected[1, 2])
    assert row["t_vhd"] == pytest.approx(float(expected[1, 2, 1]))
    np.testing.assert_allclose(found.t_vhd(2), found.tokens["t_vhd"])
    assert (found.t_vhd(1) <= found.t_vhd(2)).all() and (found.t_vhd(2) <= found.t_vhd(4)).all()
    np.testing.assert_allclose(found.t_vhd(2, relative=True), found.tokens["t_vhd_relative"])


def test_words_have_the_numbers_of_their_tokens():
    model = vision.tiny("llava")
    found = vision_head_divergence(model, prompts_of(model), how="forced", progress=False)
    words = Vocabulary({"dog": ("w6 w7",), "cat": ("w9", "w4")}, version="test")
    named = chair(found.captions, [["dog"], ["dog"], ["cat"]], words)
    table = found.of_words(named)
    assert table["object"].tolist() == ["cat", "dog", "cat"]
    assert table["right"].tolist() == [False, True, True]
    assert table["step"].tolist() == [1, 1, 0] and table["n_tokens"].tolist() == [1, 2, 1]
    own = found.tokens.query("prompt == 1 and 1 <= step <= 2")["t_vhd"].to_numpy()
    row = table.iloc[1]
    assert row["first"] == own[0] and row["largest"] == own.max() and row["mean"] == own.mean()
    with pytest.raises(DivergenceError, match="other captions"):
        found.of_words(chair(["w9"], [["dog"]], words))


def test_a_tokenizer_s_pieces_lie_side_by_side():
    model = vision.tiny("llava")
    start, end = offsets(model.tokenizer, [5, 1, 17, 8])
    assert (start, end) == ([0, 2, 2, 6], [2, 2, 6, 9])  # <s> is not written out
    assert offsets(model.tokenizer, []) == ([], [])


def test_interventions_know_where_their_spans_went():
    model = vision.tiny("qwen2_5_vl")
    mark = image_mark(model)
    example = {"text": f"w5 {mark} w6 w7 w8", "char_spans": {"end": "w7"}, "image": picture(0)}
    prompts = from_examples(model, [example])
    ids, spans = prompts[0]["input_ids"], prompts[0]["spans"]
    moved = spans_without_images(model, ids, spans)
    assert set(moved) == {"end"} and START in ids and END in ids
    start, end = moved["end"]
    assert without_images(model, [ids])[0][start:end] == [7] == ids[slice(*spans["end"])]
    seen = []

    def look(value, hook):
        call = model.call
        assert call.spans is not None
        seen.append(call.spans[0]["end"])

    with model.hooks(fwd_hooks=[("hook_embed", look)]):
        compare_passes(model, prompts, [[9]])
    assert seen == [spans["end"], moved["end"]]


def test_images_still_see_themselves():
    of_image = torch.tensor([[False, True, True, False]])
    free = hidden(of_image)[0, 0] == 0
    assert free.tolist() == [
        [True, False, False, True],
        [True, True, True, True],
        [True, True, True, True],
        [True, False, False, True],
    ]


# errors


def test_a_text_only_model_is_refused():
    with pytest.raises(ImageError, match="takes no images"):
        vision_head_divergence(tiny.tiny("llama"), ["w5 w6"], progress=False)


def test_prompts_without_images_are_refused(family):
    model = vision.tiny(family)
    for prompts in (["w5 w6"], [{"text": "w5", "image": None}]):
        with pytest.raises(ImageError, match="prompt 0: it has no image"):
            vision_head_divergence(model, from_examples(model, [
                p if isinstance(p, dict) else {"text": p} for p in prompts
            ]), progress=False)  # fmt: skip


def test_a_prompt_that_ends_in_its_image_is_refused():
    model = vision.tiny("llava")
    prompts = from_examples(
        model, [{"text": f"w5 {image_mark(model)}", "answer": " w6", "image": picture(0)}]
    )
    with pytest.raises(ImageError, match="ends in an image"):
        vision_head_divergence(model, prompts, how="forced", progress=False)


def test_other_words_are_refused():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    with tiny.unchecked():
        with pytest.raises(DivergenceError, match="how='read'.*generate, forced"):
            vision_head_divergence(model, prompts, how="read")
        with pytest.raises(DivergenceError, match="reference='blank'"):
            vision_head_divergence(model, prompts, reference="blank")
    for k in (0, 5):
        with pytest.raises(DivergenceError, match="from 1 to 4"):
            vision_head_divergence(model, prompts, k=k)
    bare = prompts.remove_columns(["answer", "answer_ids"])
    with pytest.raises(SpanError, match="prompt 0 has no answer"):
        vision_head_divergence(model, bare, how="forced", progress=False)
    found = vision_head_divergence(model, prompts, how="forced", progress=False)
    with pytest.raises(DivergenceError, match="k=9"):
        found.t_vhd(9)
    assert images_of(prompts) is not None


# the command


def test_the_command_scores_a_folder_s_model(tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    vision.build("llava").save_pretrained(folder)
    vision.processor("llava").save_pretrained(folder)
    asked = ["score", "vhd", str(folder), "--n", "3", "--new-tokens", "3", "--out", str(out)]
    assert cli.main(asked) == 0
    first = capsys.readouterr().out
    assert "relative" in first and "L0H" in first
    assert {"heads.parquet", "tokens.parquet"} <= {path.name for path in out.iterdir()}
    assert cli.main([*asked, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["heads"]) == 8
    assert cli.main([*asked, "--masked"]) != 0
    assert "reference" in capsys.readouterr().err


def test_the_command_refuses_a_text_only_model(tmp_path, capsys):
    folder = tmp_path / "model"
    families.build("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert cli.main(["score", "vhd", str(folder), "--out", str(tmp_path / "out")]) != 0
    assert "takes no images" in capsys.readouterr().err
