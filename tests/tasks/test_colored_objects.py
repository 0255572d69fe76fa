"""Coloured objects: answers follow from the text, positions from the words, misfits are counted."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.tasks import colored_objects, corrupted, describe
from interp.tasks.colored_objects import (
    COLORS,
    LIST,
    OBJECTS,
    OPENERS,
    PAPER_LIST,
    QUESTION,
    SURFACES,
)
from interp.tasks.prompts import PromptError
from tests.tasks.some_words import bpe_of, mini, mini_llama, smollm2

TOKENIZERS = {"mini-llama": mini, "smollm2": smollm2}
WORDS = " ".join([LIST, PAPER_LIST, QUESTION, *OBJECTS, *SURFACES, *OPENERS, "a and Q A , . ? :"])


def listed(text):
    """The (colour, object) pairs of a list, read off its words."""
    return re.findall(rf"a ({'|'.join(COLORS)}) (\w+)", text)


def words_at(tokenizer, row):
    """Name -> the word whose last token stands at this position."""
    ids = row["input_ids"]
    # where lists differ in length, a shorter one has None in the columns of the longer
    spans = {name: span for name, span in row["spans"].items() if span is not None}
    positions = {name: at for name, at in row["positions"].items() if at is not None}
    assert positions == {name: end - 1 for name, (_, end) in spans.items()} | {"end": len(ids) - 1}
    return {name: tokenizer.decode(ids[slice(*span)]).strip() for name, span in spans.items()}


def check(tokenizer, row, question, asked):
    """Answers and positions against the list of the question (its text) and the object asked."""
    items = {name: color for color, name in listed(question)}
    right, wrong = items[asked], row["choices"][row["choices"].index(row["corrupted_answer"])]
    words = words_at(tokenizer, row)
    assert row["answer"].strip().lower() == right == words["color"]
    assert words["object"] == words["asked"] == asked
    assert wrong.strip().lower() == words["corrupted_color"] == items[words["corrupted_object"]]
    assert [words[f"color_{i}"] for i in range(1, len(items) + 1)] == [*items.values()]
    others = [color for color in items.values() if color != right]
    assert [words[f"wrong_{i}"] for i in range(1, len(items))] == others
    at = row["positions"]
    assert at["color"] in [at[f"color_{i}"] for i in range(1, len(items) + 1)]
    assert at["object"] == at["color"] + 1
    assert [tokenizer.decode([token]).strip() for token in row["answers"]] == [
        row["answer"].strip(),
        wrong.strip(),
    ]
    assert row["corrupted_answer_ids"] == row["answers"][1:]
    assert sorted(choice.strip().lower() for choice in row["choices"]) == sorted(items.values())
    return words


def differing(row):
    pairs = zip(row["clean_input_ids"], row["corrupted_input_ids"], strict=True)
    return [i for i, (one, other) in enumerate(pairs) if one != other]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.integers(0, 99), objects=st.integers(2, 8))
@settings(max_examples=6)
def test_plain(name, seed, objects):
    tokenizer = TOKENIZERS[name]()
    for row in colored_objects(tokenizer, n=6, seed=seed, objects=objects):
        asked = re.search(r"color is the (\w+)\?", row["text"])[1]
        words = check(tokenizer, row, row["text"], asked)
        assert row["text"].endswith(f"Answer: The {asked} is") and words["begun"] == asked
        at = row["positions"]
        assert differing(row) == [at["asked"], at["begun"]]
        assert len(row["choices"]) == objects


@given(seed=st.integers(0, 99), objects=st.integers(2, 4))
@settings(max_examples=6)
def test_the_papers_form(seed, objects):
    for row in colored_objects(smollm2(), n=6, seed=seed, objects=objects, form="paper"):
        shot, shown, question, end = row["text"].split("\n")
        assert shot.startswith("Q: On the ") and question.startswith("Q: On the ") and end == "A:"
        assert (", and a " in question) == (objects > 2)
        shot_asked, asked = (
            re.search(r"\. What color is the (\w+)\?$", line)[1] for line in (shot, question)
        )
        words = check(smollm2(), row, question, asked)
        shot_color = {name: color for color, name in listed(shot)}[shot_asked]
        assert shown == f"A: {shot_color.capitalize()}" and words["shot_answer"] in shown
        others = [color for color, _ in listed(shot) if color != shot_color]
        assert [words[f"shot_wrong_{i}"] for i in range(1, objects)] == others
        one, other = ({word for item in listed(line) for word in item} for line in (shot, question))
        assert len(one) == len(other) == 2 * objects and not one & other
        assert row["answer"] == f" {words['color'].capitalize()}"
        assert differing(row) == [row["positions"]["asked"]]


def test_the_papers_form_has_words_that_mini_llama_lacks():
    with pytest.raises(PromptError, match=r"colored_objects: only 0 of n=2 .*words \(101\).*'Q'"):
        colored_objects(mini(), n=2, form="paper")


def test_colors_of_several_tokens_are_skipped_and_counted():
    known = ("red", "blue", "green", "white")
    tokenizer = bpe_of(WORDS, *known)
    found = colored_objects(tokenizer, n=40)
    assert {color.strip() for color in found["answer"]} == set(known)
    assert describe(found)["skipped"].keys() == {"an answer of several tokens"}
    assert describe(found)["skipped"]["an answer of several tokens"] > 40
    for row in found:  # colours that are no answer may be of several tokens
        words = words_at(tokenizer, row)
        assert words["color"] == row["answer"].strip()
        assert [words["wrong_1"], words["wrong_2"]] == [
            color.strip() for color in row["choices"] if color != row["answer"]
        ]


def test_objects_of_other_lengths_are_skipped_and_counted():
    tokenizer = bpe_of(WORDS.replace("ring", "").replace("cup", ""), *COLORS)
    found = colored_objects(tokenizer, n=40)
    assert describe(found)["skipped"].keys() == {"different numbers of tokens"}
    assert all(len(a) == len(b) for a, b in zip(found["input_ids"], found["corrupted_input_ids"]))


def test_seeds_decide():
    one, again, other = (colored_objects(mini(), n=5, seed=seed) for seed in (0, 0, 1))
    assert describe(one) == describe(again) and one["text"] != other["text"]
    assert describe(one)["parameters"] == {"n": 5, "seed": 0, "objects": 3, "form": "plain"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objects": 1}, "objects=1: from 2 to 8"),
        ({"objects": 9}, "objects=9: from 2 to 8"),
        ({"objects": 5, "form": "paper"}, "objects=5: from 2 to 4"),
        ({"form": "papers"}, "form='papers': one of plain, paper"),
        ({"n": 0}, "n=0"),
        ({"data": "nowhere.json"}, "data='nowhere.json': No such file"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(wrong, said):
    with pytest.raises(PromptError, match=said):
        colored_objects(mini(), **wrong)


def test_mini_llama_solves_it_on_both_sides():
    pairs = colored_objects(mini_llama())
    assert interp.evaluate(mini_llama(), pairs, progress=False).accuracy >= 0.9
    assert interp.evaluate(mini_llama(), corrupted(pairs), progress=False).accuracy >= 0.9


# BIG-bench's file

SCORES = dict.fromkeys((*COLORS, "orange", "silver", "zero", "yes"), 0)


def task(tmp_path, *examples):
    """A file of the benchmark's shape; an example is (input, right answer)."""
    rows = [{"input": text, "target_scores": SCORES | {right: 1}} for text, right in examples]
    file = tmp_path / "task.json"
    file.write_text(json.dumps({"name": "of ours", "examples": rows}))
    return file


USABLE = [
    ("On the shelf, I see a red pen and an orange cup. What color is the cup?", "orange"),
    (
        "On the mat, you see a blue key, a green hat, and a red bell. What color is the hat?",
        "green",
    ),
    ("On the desk, there is a white ring and a black book. What color is the ring?", "white"),
]
OTHERS = [
    ("On the desk, you see two red pens and a blue cup. What color is the pen?", "red"),
    ("On the desk, you see a red pen and a blue pen. What color is the pen?", "red"),
    ("On the desk, you see a red pen and a blue cup. Is the pen red?", "yes"),
    ("On the desk, you see a red pen and a blue cup. How many red things do you see?", "zero"),
    ("On the desk, I see a red pen and a cup. What color is the thing left of the cup?", "red"),
    ("On the desk, I see a red pen and a red cup. What color is the cup?", "red"),
]


def test_questions_of_the_benchmark(tmp_path):
    file = task(tmp_path, *USABLE, *OTHERS)
    found = colored_objects(smollm2(), n=3, data=file)
    texts = {text.split(" What")[0]: right for text, right in USABLE}
    for row in found:
        scene, question = row["text"].split(" Question: ")
        assert row["answer"] == f" {texts[scene]}"
        asked = re.fullmatch(r"What color is the (\w+)\? Answer: The \1 is", question)[1]
        words = words_at(smollm2(), row)
        assert words["asked"] == words["object"] == asked and words["color"] == texts[scene]
        assert f"{words['corrupted_color']} {words['corrupted_object']}" in scene
        assert row["corrupted_answer"].strip() == words["corrupted_color"] != words["color"]
        assert differing(row) == [row["positions"]["asked"], row["positions"]["begun"]]
    assert {row["text"].split(" Question")[0] for row in found} == {*texts}
    skipped = describe(found)["skipped"]
    assert skipped["an object that the list does not name once with its colour"] == 3
    assert skipped["another kind of question"] == 2
    assert describe(found)["parameters"]["data"] == str(file)


def test_questions_of_the_benchmark_in_the_papers_form(tmp_path):
    for row in colored_objects(smollm2(), n=3, data=task(tmp_path, *USABLE), form="paper"):
        shot, shown, question, _ = row["text"].split("\n")
        asked = dict(USABLE)
        assert row["answer"] == f" {asked[question.removeprefix('Q: ')].capitalize()}"
        assert shown == f"A: {asked[shot.removeprefix('Q: ')].capitalize()}"
        one, other = (set(re.findall(r"an? (\w+) (\w+)", line)) for line in (shot, question))
        assert not {word for item in one for word in item} & {w for item in other for w in item}


def test_more_than_the_benchmark_has(tmp_path):
    with pytest.raises(PromptError, match=r"only 3 of n=4 .*a list of one colour \(1\).* n=3 or"):
        colored_objects(smollm2(), n=4, data=task(tmp_path, *USABLE, *OTHERS))
    with pytest.raises(PromptError, match=r"only 0 of n=1 .*no worked example without .* \(1\)"):
        colored_objects(smollm2(), n=1, data=task(tmp_path, USABLE[0]), form="paper")


@pytest.mark.parametrize(
    "content", ["[]", "{}", "not JSON", '{"examples": [{"input": "a"}]}', '{"examples": [1]}']
)
def test_a_file_of_another_shape(tmp_path, content):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(PromptError, match="task.json'?: not a BIG-bench task"):
        colored_objects(mini(), data=tmp_path / "task.json")
