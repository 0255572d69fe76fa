"""IOI pairs: the names stand where their positions say, and only the corruption differs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.analysis.paired import pair_batch
from interp.tasks import corrupted, describe, ioi
from interp.tasks.ioi import BASIC_TEMPLATES, GIFTS, NAMES, PLACES, TEMPLATES, examples
from interp.tasks.prompts import PromptError
from tests.tasks.some_words import bpe_of, mini, mini_llama, smollm2
from tests.tiny import tokenizer as tiny_tokenizer

TOKENIZERS = {"mini-llama": mini, "smollm2": smollm2}
SENTENCES = " ".join([*TEMPLATES, *PLACES, *GIFTS])


def changed(row):
    """The positions at which the two prompts differ."""
    pairs = zip(row["clean_input_ids"], row["corrupted_input_ids"], strict=True)
    return [i for i, (one, other) in enumerate(pairs) if one != other]


def check_names(tokenizer, row):
    """What the text says, and what positions, spans and answers say, are the same."""
    at, ids, (io, s) = row["positions"], row["input_ids"], row["answers"]
    named = [word.strip(",.") for word in row["text"].split() if word.strip(",.") in NAMES]
    giver = named[2]
    receiver = next(name for name in named if name != giver)
    assert sorted(named) == sorted([giver, giver, receiver])
    assert [row["answer"], row["choices"]] == [f" {receiver}", [f" {receiver}", f" {giver}"]]
    assert tokenizer.decode([io]).strip() == receiver and tokenizer.decode([s]).strip() == giver
    assert [ids[at[name]] for name in ("IO", "S1", "S2")] == [io, s, s]
    assert at["S1"] < at["S2"] > at["IO"] and at["S1+1"] == at["S1"] + 1
    assert at["end"] == len(ids) - 1
    assert row["spans"] == {name: [at[name], at[name] + 1] for name in ("IO", "S1", "S2")}
    assert (at["IO"] < at["S1"]) == (row["order"] == "ABBA")
    assert tokenizer(row["text"] + row["answer"]).input_ids == [*ids, io]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.integers(0, 99), order=st.sampled_from(["both", "ABBA", "BABA"]))
@settings(max_examples=5)
def test_flip_changes_the_second_mention_and_the_answer(name, seed, order):
    tokenizer = TOKENIZERS[name]()
    for row in ioi(tokenizer, n=12, seed=seed, order=order):
        check_names(tokenizer, row)
        at, (io, s) = row["positions"], row["answers"]
        assert changed(row) == [at["S2"]] and row["corrupted_input_ids"][at["S2"]] == io
        assert row["corrupted_answer"] == row["choices"][1] and row["corrupted_answer_ids"] == [s]
        assert order in ("both", row["order"])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_abc_puts_three_other_names_in(name, seed):
    tokenizer = TOKENIZERS[name]()
    found = ioi(tokenizer, n=12, seed=seed, corruption="abc")
    for row in found:
        check_names(tokenizer, row)
        at = row["positions"]
        places = [at["IO"], at["S1"], at["S2"]]
        assert changed(row) == sorted(places)
        put = {tokenizer.decode([row["corrupted_input_ids"][i]]).strip() for i in places}
        assert len(put) == 3 and put < set(NAMES)
        assert not put & {choice.strip() for choice in row["choices"]}
        assert row["corrupted_answer"] is None and row["corrupted_answer_ids"] == []
    flipped = ioi(tokenizer, n=12, seed=seed)
    assert found["clean_text"] == flipped["clean_text"]


def test_both_orders_and_every_template_are_drawn():
    found = ioi(smollm2(), n=200)
    assert set(found["order"]) == {"ABBA", "BABA"}
    assert set(found["template"]) == set(range(len(TEMPLATES))) and len(TEMPLATES) == 15
    assert describe(found)["skipped"] == {}


def test_templates_with_unknown_words_are_skipped_and_counted():
    found = ioi(mini(), n=100)
    words = {"first": "Emma", "second": "David", "giver": "David", "place": "river", "gift": "cup"}
    filled = [mini()(template.format(**words)).input_ids for template in TEMPLATES]
    known = {i for i, ids in enumerate(filled) if mini().unk_token_id not in ids}
    assert set(found["template"]) == known and {*range(8)} < known < {*range(15)}
    about = describe(found)
    assert about["skipped"].keys() == {"unknown words"} and about["skipped"]["unknown words"] > 10
    assert about["task"] == "ioi" and about["parameters"]["corruption"] == "flip"


def test_the_pairs_are_the_examples_of_the_same_seed():
    found = ioi(mini(), n=20, seed=5, templates=BASIC_TEMPLATES)
    for row, example in zip(found, examples(20, seed=5), strict=True):
        for name in ("text", "corrupted_text", "answer", "corrupted_answer", "choices"):
            assert row[name] == example[name]
    assert ioi(mini(), n=20, seed=6)["text"] != ioi(mini(), n=20, seed=5)["text"]


def test_names_of_several_tokens_are_skipped_and_counted():
    known = ("Emma", "David", "Sarah", "Peter")
    tokenizer = bpe_of(SENTENCES, *known)
    found = ioi(tokenizer, n=30)
    for row in found:
        check_names(tokenizer, row)
        assert {choice.strip() for choice in row["choices"]} <= set(known)
        assert len(changed(row)) == 1
    assert describe(found)["skipped"]["an answer of several tokens"] > 100
    with pytest.raises(PromptError, match=r"ioi: only 0 of n=2 .*different numbers of tokens \("):
        ioi(tokenizer, n=2, corruption="abc")  # needs five names


def test_a_tokenizer_that_knows_no_name():
    with pytest.raises(PromptError, match=r"ioi: only 0 of n=3 .* unknown words \(151\)"):
        ioi(tiny_tokenizer(), n=3)


def test_templates_of_ones_own():
    template = "At noon {second} and {first} walked by the {place}. {giver} talked to"
    with pytest.raises(PromptError, match=r"ioi: only 0 .*unknown words .*'by' of"):
        ioi(mini(), n=1, templates=[template])
    row = ioi(mini(), n=1, templates=[template.replace("by", "past")])[0]
    check_names(mini(), row | {"order": {"ABBA": "BABA", "BABA": "ABBA"}[row["order"]]})
    assert row["text"].startswith("At noon ") and row["text"].endswith(" talked to")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"corruption": "abd"}, "corruption='abd': one of flip, abc"),
        ({"order": "AB"}, "order='AB': one of both, ABBA, BABA"),
        ({"n": 0}, "n=0"),
        ({"templates": []}, "templates: none"),
        ({"templates": ["{first} gave {second} to"]}, "has the fields first, second; it needs"),
        ({"templates": ["{giver} and {first} met {second}"]}, "then {giver}, once each"),
        ({"templates": ["{first} {second} {giver} {time} to"]}, "has the fields .*time"),
        ({"templates": ["{first} {second} {giver} to "]}, "ends with a space"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(wrong, said):
    with pytest.raises(PromptError, match=said):
        ioi(mini(), **wrong)


def test_mini_llama_solves_it_on_both_sides():
    pairs = ioi(mini_llama())
    assert len(pairs) == 64 and len(pair_batch(mini_llama(), pairs)) == 64
    assert interp.evaluate(mini_llama(), pairs, progress=False).accuracy >= 0.9
    assert interp.evaluate(mini_llama(), corrupted(pairs), progress=False).accuracy >= 0.9
