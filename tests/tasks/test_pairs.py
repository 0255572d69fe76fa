"""Pairs of one's own: text or ids, places, and one clear error for each mistake."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interp
from interp.analysis.paired import pair_batch
from interp.model.hooked import load
from interp.tasks import describe
from interp.tasks.pairs import corrupted, pairs
from interp.tasks.prompts import PromptError, SpanError
from tests.model.families import build
from tests.tasks.conftest import tokenizer_named
from tests.tiny import random_ids, tiny, tokenizer, words

IDS = st.lists(st.integers(3, 59), min_size=1, max_size=6)
CLEAN, CORRUPTED = ["w5 w6 w7", "w8 w9"], ["w5 w10 w7", "w8 w11"]
ANSWERS = [(" w12", " w13"), (" w14", " w15")]


def made(**change):
    """Two good pairs, with something changed."""
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "answers": ANSWERS} | change
    return pairs(tiny("llama"), **given)


def test_every_column_is_there():
    found = made(positions={"key": ["w6", "w9"]}, corrupted_answers=[" w13", " w15"])
    assert found[0] == {
        "text": "w5 w6 w7",
        "input_ids": [5, 6, 7],
        "answer": " w12",
        "answer_ids": [12],
        "spans": {"key": [1, 2]},
        "choices": [" w12", " w13"],
        "clean_text": "w5 w6 w7",
        "clean_input_ids": [5, 6, 7],
        "corrupted_text": "w5 w10 w7",
        "corrupted_input_ids": [5, 10, 7],
        "corrupted_answer": " w13",
        "corrupted_answer_ids": [13],
        "answers": [12, 13],
        "positions": {"key": 1, "end": 2},
    }
    assert found[1]["positions"] == {"key": 1, "end": 1}


@given(st.lists(st.tuples(IDS, st.integers(3, 59)), min_size=1, max_size=4))
def test_ids_and_their_text_are_the_same_pairs(drawn):
    clean = [ids for ids, _ in drawn]
    other = [[token, *ids[1:]] for ids, token in drawn]
    by_ids = pairs(tokenizer(), clean, other, answers=(7, 8), corrupted_answers=8)
    texts = [words(ids) for ids in clean], [words(ids) for ids in other]
    by_text = pairs(tokenizer(), *texts, answers=(" w7", " w8"), corrupted_answers=" w8")
    rows = by_text.to_list()
    assert by_ids.to_list() == rows
    assert [row["input_ids"] for row in rows] == clean
    assert [row["corrupted_input_ids"] for row in rows] == other


@pytest.mark.parametrize(
    "answers",
    [
        (" w12", " w13"),
        [" w12", " w13"],
        [(" w12", " w13")] * 2,
        (12, 13),
        [[12, 13], [12, 13]],
        torch.tensor([12, 13]),
        torch.tensor([[12, 13]] * 2),
        np.array([[12, 13]] * 2),
        [(" w12", 13)] * 2,
        [torch.tensor([12, 13])] * 2,
    ],
    ids=str,
)
def test_answers_may_be_given_as(answers):
    found = made(answers=answers)
    assert found["answers"] == [[12, 13]] * 2
    assert found["answer"] == [" w12"] * 2 and found["choices"] == [[" w12", " w13"]] * 2


@pytest.mark.parametrize(
    ("clean", "corrupted"),
    [
        (torch.tensor([[5, 6], [7, 8]]), torch.tensor([[5, 9], [7, 9]])),
        ([[5, 6], [7, 8]], [[5, 9], [7, 9]]),
        ([torch.tensor([5, 6]), (7, 8)], np.array([[5, 9], [7, 9]])),
        (["w5 w6", [7, 8]], ["w5 w9", "w7 w9"]),
    ],
    ids=["tensors", "lists", "mixed lists", "text and ids"],
)
def test_prompts_may_be_given_as(clean, corrupted):
    found = made(clean=clean, corrupted=corrupted)
    assert found["clean_input_ids"] == [[5, 6], [7, 8]]
    assert found["corrupted_input_ids"] == [[5, 9], [7, 9]]
    assert found["text"] == ["w5 w6", "w7 w8"] and found["corrupted_text"] == ["w5 w9", "w7 w9"]


def test_one_prompt_needs_no_list():
    for clean in ("w5 w6", [5, 6], torch.tensor([5, 6])):
        assert made(clean=clean, corrupted=None, answers=(7, 8))["input_ids"] == [[5, 6]]


def test_without_a_corrupted_prompt_it_is_the_clean_one_again():
    row = made(corrupted=None)[0]
    assert row["corrupted_input_ids"] == row["clean_input_ids"] == [5, 6, 7]
    assert row["corrupted_answer"] == row["answer"] == " w12"


@pytest.mark.parametrize(
    ("place", "spans", "positions"),
    [
        (0, [[0, 1], [0, 1]], [0, 0]),
        (-2, [[1, 2], [0, 1]], [1, 0]),
        ([2, -1], [[2, 3], [1, 2]], [2, 1]),
        (torch.tensor([1, 0]), [[1, 2], [0, 1]], [1, 0]),
        (["w5 w6", "w9"], [[0, 2], [1, 2]], [1, 1]),
        (["w6", (0, 5)], [[1, 2], [0, 2]], [1, 1]),
        ([(3, 4), 1], [[1, 2], [1, 2]], [1, 1]),
    ],
    ids=str,
)
def test_places_may_be_given_as(place, spans, positions):
    found = made(positions={"here": place})
    assert [row["here"] for row in found["spans"]] == spans
    assert [row["here"] for row in found["positions"]] == positions


def test_a_span_of_several_tokens_has_its_position_at_the_last():
    bytes_only = tokenizer_named("without offsets")
    text = "a bell rang"
    row = pairs(bytes_only, [text], answers=("s", "!"), positions={"it": "bell"})[0]
    start, end = row["spans"]["it"]
    assert bytes_only.decode(row["input_ids"][start:end]) == "bell"
    assert row["positions"] == {"it": end - 1, "end": len(text) - 1}


def test_what_the_tokenizer_puts_around_the_text():
    wordpiece = tokenizer_named("wordpiece")
    row = pairs(wordpiece, ["The old farmer"], ["The old sailor"], answers=(" walked", " looked"))[
        0
    ]
    assert row["input_ids"] == wordpiece("The old farmer").input_ids[:-1]  # without [SEP]
    assert row["spans"] == {"text": [1, len(row["input_ids"])]}


def test_choices():
    assert made()["choices"] == [[" w12", " w13"], [" w14", " w15"]]
    offered = [" w12", " w14", " w20"]
    assert made(choices=offered)["choices"] == [offered] * 2
    each = [[" w12", " w20"], [" w21", " w14"]]
    assert made(choices=each)["choices"] == each


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pairs_can_be_evaluated_and_batched(family):
    model, clean = tiny(family), random_ids(6, 4, 9, seed=1)
    other = [[*ids[:-2], 5, ids[-1]] for ids in clean]
    with torch.no_grad():
        logits = [model(torch.tensor([ids]))[0, -1] for ids in clean]
        turned = [model(torch.tensor([ids]))[0, -1] for ids in other]
    answers = [(int(row.argmax()), int(row.argmin())) for row in logits]
    back = [int(row.argmax()) for row in turned]
    found = pairs(model, clean, other, answers=answers, corrupted_answers=back)
    result = interp.evaluate(model, found, progress=False)
    assert result.accuracy == 1.0
    by_hand = [float(row.max() - row.min()) for row in logits]
    assert result.table["logit_diff"].tolist() == pytest.approx(by_hand, abs=1e-4)
    assert interp.evaluate(model, corrupted(found), progress=False).accuracy == 1.0
    batch = pair_batch(model, found)
    assert [batch.right.tolist(), batch.wrong.tolist()] == [[*column] for column in zip(*answers)]
    assert (batch.columns("end") == batch.n_tokens - 1).all()


def test_the_corrupted_side():
    found = corrupted(made(corrupted_answers=[" w13", " w15"], task="mine", parameters={"a": 1}))
    assert found[0] == {
        "text": "w5 w10 w7",
        "input_ids": [5, 10, 7],
        "answer": " w13",
        "answer_ids": [13],
        "spans": {"text": [0, 3]},
        "choices": [" w12", " w13"],
    }
    assert describe(found)["task"] == "mine, corrupted"
    assert describe(found)["parameters"] == {"a": 1}
    unknown = corrupted(made())
    assert unknown["answer"] == ["", ""] and unknown["answer_ids"] == [[], []]
    assert interp.evaluate(tiny("llama"), unknown, progress=False).summary()["metric"][0] == "loss"
    with pytest.raises(PromptError, match="no column 'corrupted_answer'; make them with"):
        corrupted(found)


def test_a_model_without_tokenizer_takes_ids():
    model = load(build("llama"))
    assert model.tokenizer is None
    clean, other = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[5, 9], [7, 9]])
    found = pairs(model, clean, other, answers=torch.tensor([[1, 2], [3, 4]]), positions={"x": 0})
    assert found["text"] == found["corrupted_text"] == ["", ""]
    assert found["choices"] == [[], []] and found["answers"] == [[1, 2], [3, 4]]
    assert describe(found)["tokens"] == {}
    assert pair_batch(model, found).columns("x").tolist() == [0, 0]
    assert len(interp.evaluate(model, found, progress=False).table) == 2
    for wrong in ({"clean": ["a b"] * 2}, {"answers": (" a", " b")}):
        with pytest.raises(PromptError, match="tokenizer"):
            pairs(model, **{"clean": clean, "corrupted": other, "answers": (1, 2)} | wrong)


def test_ids_that_are_not_the_tokens_of_their_text_have_no_choices():
    """`evaluate` reads choices off the text, which these prompts are not made of."""
    bpe = tokenizer_named("bytes")
    cut = [token for letter in "The farmer" for token in bpe(letter).input_ids]
    assert bpe.decode(cut) == "The farmer" and bpe("The farmer").input_ids != cut
    whole = bpe("The farmer").input_ids
    found = pairs(bpe, [cut, whole], answers=(bpe(" a").input_ids[0], bpe("s").input_ids[0]))
    assert found["choices"] == [[], [" a", "s"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clean": []}, "clean: the list is empty"),
        ({"clean": None}, "clean: NoneType is neither texts nor token ids"),
        ({"clean": torch.full((2, 3), 0.5)}, "clean, pair 0: .* nor a list of whole token ids"),
        ({"clean": ["w5", 3.5]}, "clean, pair 1: '3.5' is neither text"),
        ({"clean": ["w5 w6 w7", " "]}, "clean, pair 1: nothing in it"),
        ({"clean": [[5], []]}, "clean, pair 1: nothing in it"),
        ({"corrupted": ["w5 w6 w7"]}, "corrupted: 1 for 2 clean prompts; give one for each"),
        ({"answers": [(1, 2)] * 3}, "answers: 3 for 2 clean prompts"),
        ({"answers": " w12"}, "answers: str; give \\(right, wrong\\)"),
        ({"answers": [(1, 2), (3, 4, 5)]}, "answers: pair 1 has .3, 4, 5."),
        ({"answers": [(1, 2), (" w12", "")]}, "answers: pair 1 .* text that is not empty"),
        ({"answers": [(1, 2), (3, None)]}, "answers: pair 1"),
        ({"corrupted": ["w5 w6 w7", "w8 w9 w3"]}, "pair 1: 2 clean and 3 corrupted tokens"),
        ({"answers": [(1, 2), (" w3 w4", " w5")]}, "pair 1: the answer ' w3 w4' is 2 tokens"),
        ({"answers": [(1, 2), (" w3", " w5 w6")]}, "pair 1: the answer ' w5 w6' is 2 tokens"),
        ({"answers": [(1, 2), (" ", " w5")]}, "pair 1: no token of its own .* the space"),
        ({"answers": [(1, 2), (" zebra", " w5")]}, "pair 1: the answer ' zebra' is no word"),
        ({"answers": [(1, 2), (7, 7)]}, "pair 1: right and wrong .* same token 7; give two"),
        ({"answers": [(1, 2), (7, 60)]}, "answers, pair 1: token 60 .* model's 60; give"),
        ({"clean": [[5, 6, 7], [8, -1]]}, "clean, pair 1: token -1 is not among the model's 60"),
        ({"corrupted": [[5, 6, 7], [8, 99]]}, "corrupted, pair 1: token 99"),
        ({"corrupted_answers": [1, 60]}, "corrupted_answers: token 60"),
        ({"corrupted_answers": [1]}, "corrupted_answers: 1 for 2 clean prompts"),
        ({"corrupted_answers": [1, " w3 w4"]}, "pair 1: the answer ' w3 w4' is 2 tokens"),
        ({"choices": [" w12"]}, "pair 1: choices=.* without the right answer ' w14'; add it"),
        ({"choices": [[" w12"], "w14"]}, "choices: pair 1 has 'w14'; give a list"),
        ({"choices": [[" w12"]]}, "choices: 1 for 2"),
        ({"positions": {"end": 0}}, "positions: 'end' is always the last token"),
        ({"positions": {"x": 2}}, r"pair 1: positions\['x'\]: 2 is outside .* -2 to 1"),
        ({"positions": {"x": [0]}}, r"positions\['x'\]: 1 for 2 clean prompts"),
        ({"positions": {"x": "w5"}}, r"pair 1: positions\['x'\]: 'w5' occurs 0 times"),
        ({"positions": {"x": "w"}}, r"pair 0: positions\['x'\]: 'w' occurs 3 times"),
        ({"positions": {"x": [(0, 1), (0, 50)]}}, r"pair 1: .*characters \[0, 50\)"),
        ({"positions": {"x": [(0, 1), (0, 1, 2)]}}, r"pair 1: .*give the index of a token"),
        ({"positions": {"x": [0, 1.5]}}, r"pair 1: .*1.5; give the index of a token"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told(change, said):
    with pytest.raises(PromptError, match=said):
        made(**change)


def test_a_text_as_place_needs_a_prompt_that_was_text():
    with pytest.raises(PromptError, match=r"pair 0: positions\['x'\]: 'w6', but .* token ids"):
        made(clean=[[5, 6, 7], [8, 9]], positions={"x": "w6"})


def test_kinds_of_error_stay():
    with pytest.raises(SpanError):
        made(positions={"x": "w5"})


def test_answers_that_merge_with_the_prompt():
    bpe = tokenizer_named("bytes")
    with pytest.raises(PromptError, match="pair 0: no token of its own begins the answer 'armer'"):
        pairs(bpe, ["The old f"], answers=("armer", " a"))


def test_prompts_longer_than_the_window():
    n_ctx = tiny("llama").cfg.n_ctx
    with pytest.raises(PromptError, match=f"window has {n_ctx}"):
        made(clean=torch.full((1, n_ctx), 5), corrupted=None, answers=(7, 8))
