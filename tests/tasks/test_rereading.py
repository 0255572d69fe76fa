"""Questions read twice: the text says what it should, and spans stay with their words."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.tasks import PromptError, describe, from_examples, ioi, needle
from interp.tasks.prompts import spans_of
from interp.tasks.rereading import CUE, read_again, reread
from tests.tasks.conftest import tokenizer_named
from tests.tasks.some_words import bpe_of, smollm2
from tests.tiny import tiny, with_answers

QUESTION = "The lamp is red. What color is the lamp?"
TEXT = f"Look at this. {QUESTION} Answer:"


def known():
    return bpe_of(TEXT + " Read the question again : blue")


def prompts(tokenizer, text=TEXT, **spans) -> Dataset:
    spans = {"lamp": (18, 22), "look": (0, 4), "end": (55, 62), **spans}
    spans["question"] = (text.index("The"), text.index("?") + 1)
    example = {"text": text, "answer": " red", "char_spans": spans, "choices": [" red", " blue"]}
    return from_examples(tokenizer, [example])


def said(tokenizer, row: dict) -> dict[str, str]:
    return {n: tokenizer.decode(row["input_ids"][slice(*s)]).strip()
            for n, s in row["spans"].items() if s is not None}  # fmt: skip


TOKENIZERS = {"words": known, "smollm2": smollm2, "pieces": lambda: tokenizer_named("metaspace")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_question_stands_twice(name):
    tokenizer = TOKENIZERS[name]()
    row = prompts(tokenizer)[0]
    again = read_again(tokenizer, row, "question")
    assert again["text"] == f"Look at this. {QUESTION}{CUE}{QUESTION} Answer:"
    whole = tokenizer(again["text"]).input_ids
    assert whole[: len(again["input_ids"])] == again["input_ids"]
    assert again["answer_ids"] == row["answer_ids"] and again["choices"] == row["choices"]


@pytest.mark.parametrize("name", ["words", "smollm2"])
def test_spans_stay_with_their_words(name):
    tokenizer = TOKENIZERS[name]()
    row = prompts(tokenizer)[0]
    again = read_again(tokenizer, row, "question")
    assert said(tokenizer, again) == {
        "lamp": "lamp", "again_lamp": "lamp", "look": "Look", "end": "Answer:",
        "question": QUESTION, "again_question": QUESTION, "question_1": QUESTION,
        "question_2": QUESTION, "cue": CUE.strip(),
    }  # fmt: skip
    spans = again["spans"]
    assert spans["lamp"] == row["spans"]["lamp"] and spans["look"] == row["spans"]["look"]
    assert spans["question_1"] == row["spans"]["question"] == spans["question"]
    assert spans["lamp"][1] < spans["cue"][0] < spans["again_lamp"][0] < spans["end"][0]


def test_spans_across_an_edge():
    """One that begins before and ends within stays in the first copy; one around holds both."""
    tokenizer = known()
    rows = prompts(tokenizer, before=(0, 22), around=(0, 62), after=(44, 62))
    told = said(tokenizer, read_again(tokenizer, rows[0], "question"))
    assert told["before"] == "Look at this. The lamp"
    assert told["around"] == f"Look at this. {QUESTION}{CUE}{QUESTION} Answer:"
    assert told["after"].startswith("the lamp?") and told["after"].endswith("Answer:")
    assert not {"again_before", "again_around", "again_after"} & told.keys()


def test_all_of_a_prompt():
    tokenizer = known()
    again = read_again(tokenizer, prompts(tokenizer)[0])
    assert again["text"] == TEXT + CUE + TEXT
    assert said(tokenizer, again)["again_end"] == "Answer:"


@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_the_first_copy_is_as_before(seed):
    """So a cache of the prompt could be used again: what is new comes behind it."""
    tokenizer = smollm2()
    for row in needle(tokenizer, [96], n=2, depths=2, seed=seed):
        again = read_again(tokenizer, row, "question")
        stop = row["spans"]["question"][1]
        assert again["input_ids"][:stop] == row["input_ids"][:stop]
        answer = slice(*row["spans"]["answer"])
        assert again["input_ids"][slice(*again["spans"]["answer"])] == row["input_ids"][answer]
        one, two = (again["spans"][f"question_{n}"] for n in (1, 2))
        # apart from the space that a word begins with
        assert again["input_ids"][one[0] + 1 : one[1]] == again["input_ids"][two[0] + 1 : two[1]]


def test_many_prompts_at_once():
    tokenizer = known()
    rows = prompts(tokenizer)
    twice = reread(tokenizer, rows, question="question", cue=" again ")
    expected = read_again(tokenizer, rows[0], "question", " again ")
    assert twice[0]["text"] == expected["text"] and spans_of(twice) == [expected["spans"]]
    about = describe(twice)
    assert about["task"] == "examples, read twice"
    assert about["parameters"] == {"question": "question", "cue": " again "}


def test_a_chat_is_read_twice_with_its_special_tokens_once():
    tokenizer = smollm2()
    example = {"text": "What color is the lamp?", "char_spans": {"question": "color is the lamp"}}
    try:
        rows = from_examples(tokenizer, [example], chat=True)
    except PromptError:
        pytest.skip("this tokenizer has no chat template")
    again = read_again(tokenizer, rows[0], "question")
    assert again["input_ids"] == tokenizer(again["text"], add_special_tokens=False).input_ids
    assert again["text"].count("color is the lamp") == 2


def test_pairs_are_read_twice_on_their_clean_side():
    tokenizer = smollm2()
    row = ioi(tokenizer, n=1)[0]
    again = read_again(tokenizer, {**row, "spans": {k: v for k, v in row["spans"].items() if v}})
    assert again["text"] == row["text"] + CUE + row["text"]


# The intervention


@pytest.mark.parametrize("question", ["question", None])
def test_applied_it_does_the_same(question):
    model, edit = tiny("llama"), interp.RE2(question, " w7 ")
    row = with_answers([[5, 6, 8, 9]], [[10]], [(1, 3)])[0]
    row["spans"]["question"] = [1, 4]
    new = edit.prepare(row, model)
    assert new == read_again(model, row, question, " w7 ")
    copied = [6, 8, 9] if question else [5, 6, 8, 9]
    assert new["input_ids"] == [5, 6, 8, 9, 7, *copied] and list(edit.hooks(model)) == []


def test_it_says_in_words_what_it_does():
    assert "the span 'question' is read twice, 'Read the question again:'" in repr(
        interp.RE2("question")
    )
    assert "the whole prompt" in repr(interp.RE2())


# What is refused


def test_what_cannot_be_read_again():
    tokenizer = known()
    row = prompts(tokenizer)[0]
    with pytest.raises(PromptError, match="prompt 0: no span 'needle'.*it has lamp, look, end"):
        read_again(tokenizer, row, "needle")
    with pytest.raises(PromptError, match="prompt 3: its tokens are not those of its text"):
        read_again(tokenizer, {**row, "input_ids": row["input_ids"][1:]}, "question", n=3)
    blind = tokenizer_named("without offsets")
    with pytest.raises(PromptError, match="does not tell where its tokens stand"):
        read_again(blind, from_examples(blind, [{"text": "What is it?"}])[0])
    with pytest.raises(interp.intervention.base.InterventionError, match="question=''"):
        interp.RE2("")
