"""Pruned image tokens, against plain transformers given the chosen features by hand."""

from functools import cache

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import interp
from interp.evaluation import EvaluationError, compare, evaluate, forced_logits, prepared
from interp.intervention.base import InterventionError
from interp.intervention.vtc import VTC
from interp.model.images import ImageError, image_mark, images_of, pixel_inputs
from interp.tasks import from_examples
from tests import tiny
from tests.intervention.test_head_modulation import build, tiny_model
from tests.model import vision_families as vision
from tests.model.vision_families import IMAGE, picture
from tests.tiny import unchecked

FULL, KEEP = 64, 10
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
SCORES = ("class", "received", "random", "uniform", "least")


@cache
def prompts_of():
    """One and two images (that touch each other), and none."""
    model = tiny_model("large_llava")
    mark = image_mark(model)
    return from_examples(
        model,
        [
            {
                "text": f"w5 {mark} w6 w7",
                "answer": " w8 w9",
                "image": picture(0, 16, 32),
                "char_spans": {"end": "w6 w7"},
                "choices": [" w8", " w11"],
            },
            {
                "text": f"w9 {mark}{mark} w5 w6",
                "answer": " w5 w6 w7",
                "image": [picture(1, 16, 32), picture(2, 24, 16)],
                "char_spans": {"end": "w5 w6"},
                "choices": [" w5", " w12"],
            },
            {
                "text": "w3 w4 w5",
                "answer": " w4",
                "image": None,
                "char_spans": {"end": "w4 w5"},
                "choices": [" w4", " w3"],
            },
        ],
    )


@cache
def plain():
    return build("large_llava")


@cache
def maps(seed: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """The encoder's attention in each layer, [head, query, key], and the features of an image."""
    pixels = pixel_inputs(tiny_model("large_llava"), [picture(seed, height, width)])
    with torch.no_grad():
        out = plain().model.vision_tower(
            pixels["pixel_values"], output_attentions=True, output_hidden_states=True
        )
    return *(layer[0] for layer in out.attentions), out.hidden_states[-2][0, 1:]


def kept_by_hand(edit: VTC, size) -> list[int]:
    """The card: sum over layers up to the features' (1 of 0-2), mean over heads, top R."""
    *layers, _ = maps(*size)
    total = [0.0] * FULL
    for layer in range(max(0, 2 - edit.n_layers), 2):
        for j in range(FULL):
            if edit.score == "received":
                total[j] += float(layers[layer].mean(0)[:, 1 + j].mean())
            else:
                total[j] += float(layers[layer][:, 0, 1 + j].mean())
    if edit.score == "uniform":
        return [int((i + 0.5) * FULL / edit.keep) for i in range(edit.keep)]
    if edit.score == "random":
        generator = torch.Generator().manual_seed(edit.seed)
        return sorted(torch.randperm(FULL, generator=generator)[: edit.keep].tolist())
    sign = 1 if edit.score == "least" else -1
    return sorted(sorted(range(FULL), key=lambda j: (sign * total[j], j))[: edit.keep])


SIZES = {0: [(0, 16, 32)], 1: [(1, 16, 32), (2, 24, 16)], 2: []}


def by_hand(edit: VTC, row: int, answer: list[int]) -> torch.Tensor:
    """Logits of plain transformers on embeddings put together token by token."""
    model, ids = plain(), prompts_of()[row]["input_ids"]
    text = [i for i in ids if i != IMAGE]
    place = ids.index(IMAGE) if IMAGE in ids else len(text)
    with torch.no_grad():
        embed = model.get_input_embeddings()
        parts = [embed(torch.tensor(text[:place], dtype=torch.long))]
        for size in SIZES[row]:
            features = maps(*size)[-1][kept_by_hand(edit, size)]
            parts.append(model.model.multi_modal_projector(features))
        parts.append(embed(torch.tensor(text[place:] + answer[:-1], dtype=torch.long)))
        out = model(inputs_embeds=torch.cat(parts)[None])
    return out.logits[0, -len(answer) :]


def forced(edit, batch_size: int = 3) -> list[torch.Tensor]:
    """What predicts each answer's tokens, in padded batches."""
    model, full, found = tiny_model("large_llava"), prompts_of(), {}
    answers = full["answer_ids"]
    with model.intervene(edit):
        prompts = prepared(model, full)
        for batch in forced_logits(
            model, prompts["input_ids"], answers, images=images_of(prompts), batch_size=batch_size
        ):
            rows = zip(batch.rows, batch.logits)
            found |= {row: logits[-len(answers[row]) :] for row, logits in rows}
    return [found[row] for row in range(len(answers))]


@pytest.mark.parametrize("n_layers", [1, 7])
@pytest.mark.parametrize("score", SCORES)
def test_it_is_the_definition(score, n_layers):
    edit = VTC(KEEP, n_layers, score, seed=3)
    found = forced(edit)
    for row, answer in enumerate(prompts_of()["answer_ids"]):
        assert_close(found[row], by_hand(edit, row, answer), **TOLERANCE)
    if n_layers == 7:
        for one, other in zip(found, forced(edit, batch_size=1)):
            assert_close(one, other, **TOLERANCE)


def test_keeping_all_is_the_same_to_the_bit():
    before = forced([])
    for keep in (FULL, FULL + 1):
        for one, other in zip(forced(VTC(keep)), before):
            assert torch.equal(one, other)


def test_it_is_undone():
    before = forced([])
    forced(VTC(KEEP))
    for one, other in zip(forced([]), before):
        assert torch.equal(one, other)


def test_the_cache_has_the_tokens_that_are_left_and_writing_is_as_reading():
    model, edit, full = tiny_model("large_llava"), VTC(KEEP), prompts_of()
    with model.intervene(edit):
        rows = [model.prepare(dict(row)) for row in full]
        batch = model.batch([row["input_ids"] for row in rows], images=[r["image"] for r in rows])
        out = model.original_model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=3,
            min_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True, **batch.inputs,
        )  # fmt: skip
        alone = [
            model.continue_greedily(one.input_ids, one.attention_mask, 3, **one.inputs)[0].tolist()
            for one in (model.batch([r["input_ids"]], images=[r["image"]]) for r in rows)
        ]
        with torch.no_grad():
            filled = model.original_model(
                batch.input_ids, attention_mask=batch.attention_mask, use_cache=True, **batch.inputs
            )
    n_text = [len([i for i in ids if i != IMAGE]) for ids in prompts_of()["input_ids"]]
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths == [n_text[0] + KEEP, n_text[1] + 2 * KEEP, n_text[2]]
    assert filled.cache.get_seq_length() == max(lengths)
    new = out.sequences[:, batch.input_ids.shape[1] :].tolist()
    for row, tokens in enumerate(new):
        assert tokens[: len(alone[row])] == alone[row][: len(tokens)]
        logits = torch.stack([step[row] for step in out.logits])
        assert_close(logits, by_hand(edit, row, tokens), **TOLERANCE)


def test_evaluating_and_comparing_prepare_by_themselves():
    model, prompts = tiny_model("large_llava"), prompts_of()
    found = compare(model, prompts, {"none": [], "pruned": VTC(KEEP)}, progress=False)
    losses = {name: one.table["loss"].tolist() for name, one in found.evaluations.items()}
    assert losses["pruned"][2] == pytest.approx(losses["none"][2], abs=1e-5)
    for row in (0, 1):
        answer = prompts["answer_ids"][row]
        wanted = torch.nn.functional.cross_entropy(
            by_hand(VTC(KEEP), row, answer), torch.tensor(answer)
        )
        assert losses["pruned"][row] == pytest.approx(float(wanted), abs=1e-4)
        assert losses["pruned"][row] != pytest.approx(losses["none"][row], abs=1e-3)
    with model.intervene(VTC(KEEP)):
        written = evaluate(model, prompts, generate=True, batch_size=2, progress=False)
        texts = evaluate(model, from_examples(model, examples()), progress=False)
    assert len(written.table) == 3
    assert texts.table["loss"].tolist() == pytest.approx(losses["pruned"][:1], abs=1e-5)


def examples():
    mark = image_mark(tiny_model("large_llava"))
    return [{"text": f"w5 {mark} w6 w7", "answer": " w8 w9", "image": picture(0, 16, 32)}]


def test_spans_move_along_and_the_row_is_left_as_it_was():
    model = tiny_model("large_llava")
    for row in prompts_of():
        before = {key: str(value) for key, value in row.items()}
        new = VTC(KEEP).prepare(row, model)
        assert {key: str(value) for key, value in row.items()} == before
        if row["image"] is None or row["image"] == []:
            assert new is row
            continue
        n = len(row["image"])
        assert new["input_ids"].count(IMAGE) == n * KEEP
        names = ["image"] if n == 1 else ["image_1", "image_2"]
        for name in names:
            start, end = new["spans"][name]
            assert end - start == KEEP and set(new["input_ids"][start:end]) == {IMAGE}
        start, end = new["spans"]["end"]
        old = row["spans"]["end"]
        assert new["input_ids"][start:end] == row["input_ids"][old[0] : old[1]]
        assert VTC(KEEP).prepare(new, model) is new
        assert VTC(FULL).prepare(row, model) is row


def test_more_patches_are_those_and_others():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, FULL, generator=generator)
    scores[1] = 0.5  # all alike
    for score in SCORES:
        if score == "uniform":
            continue
        few, many = (VTC(n, score=score).kept(scores) for n in (KEEP, 2 * KEEP))
        assert (few.diff(dim=1) > 0).all() and few.min() >= 0 and many.max() < FULL
        for one, other in zip(few.tolist(), many.tolist()):
            assert set(one) < set(other)
    assert VTC(KEEP).kept(scores)[1].tolist() == list(range(KEEP))
    assert VTC(3, score="uniform").kept(scores[:, :9])[0].tolist() == [1, 4, 7]


def test_the_loss_of_a_prompt_s_own_tokens_is_not_asked_for():
    model = tiny_model("large_llava")
    mark = image_mark(model)
    texts = from_examples(model, [{"text": f"w5 {mark} w6 w7", "image": picture(0)}])
    with (
        model.intervene(VTC(KEEP)),
        pytest.raises(EvaluationError, match="changes prompts"),
    ):
        evaluate(model, texts, progress=False)


def test_prompts_that_nobody_made_shorter_are_refused():
    model, prompts = tiny_model("large_llava"), prompts_of()
    with (
        model.intervene(VTC(KEEP)),
        pytest.raises(ImageError, match=f"it has {FULL} image tokens, and its images want {KEEP}"),
    ):
        model.batch([prompts[0]["input_ids"]], images=[prompts[0]["image"]])
    other = {"input_ids": [5, *[IMAGE] * 7], "image": picture(0), "spans": {}}
    with pytest.raises(ImageError, match="7 image tokens.*has 64"):
        VTC(KEEP).prepare(other, model)


def test_models_that_arrange_their_features_and_encoders_without_cls_are_refused():
    cases = [
        (tiny.tiny("llama"), VTC(KEEP), "takes no images"),
        (vision.tiny("llava_next"), VTC(KEEP), "LlavaNext.*arranges the features.*LLaVA-1.5"),
        (vision.tiny("qwen2_5_vl"), VTC(KEEP), "Qwen2_5_VL.*arranges the features"),
        (vision.tiny("qwen3_vl"), VTC(KEEP, score="random"), "arranges the features"),
    ]
    for model, edit, said in cases:
        with pytest.raises(ImageError, match=said), model.intervene(edit):
            raise AssertionError("the block was entered")
        with pytest.raises(ImageError, match=said):
            edit.prepare({"input_ids": [1, 2], "spans": {}}, model)


def test_it_goes_with_head_modulation():
    """The tokens that are left are found again among the pruned features."""
    pai = interp.HeadModulation.pai(0.7, slice(0, None))
    both, pruned = forced([VTC(KEEP), pai]), forced(VTC(KEEP))
    assert (both[0] - pruned[0]).abs().max() > 1e-3
    assert_close(both[2], pruned[2], **TOLERANCE)
    chosen = interp.HeadModulation(layers=slice(0, None))
    with pytest.raises(ImageError, match="prunes"):
        forced([VTC(KEEP), chosen])


def test_it_is_saved_and_said_in_words(tmp_path):
    edits = [VTC(KEEP), VTC(12, 1), VTC(12, score="uniform"), VTC(12, score="random", seed=2)]
    assert len({repr(edit) for edit in edits}) == 4
    for n, edit in enumerate(edits):
        loaded = interp.load_intervention(edit.save_pretrained(tmp_path / str(n)))
        assert loaded == edit and repr(loaded) == repr(edit)
    assert "10 patches that the CLS token looks at most in 7 layers" in repr(edits[0])
    for options, said in (({"keep": 0}, "keep=0"), ({"keep": 3, "n_layers": 0}, "n_layers=0"),
                          ({"keep": 3, "score": "cls"}, "score='cls': one of class")):  # fmt: skip
        with unchecked(), pytest.raises(InterventionError, match=said):
            VTC(**options)


def test_a_data_set_of_pruned_prompts_stays_one():
    model, full = tiny_model("large_llava"), prompts_of()
    with model.intervene(VTC(KEEP)):
        pruned = prepared(model, full)
    assert isinstance(pruned, Dataset) and pruned.column_names == full.column_names
