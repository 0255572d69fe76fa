"""Right and wrong continuations, as the tokens that stand behind their prompts."""

import pytest
from datasets import Dataset

from interp.tasks.continuations import answers_of, statements, tokens_after, wrong_answers_of
from interp.tasks.multiple_choice import multiple_choice
from interp.tasks.pairs import pairs
from interp.tasks.prompts import PromptError, as_prompts, from_examples
from tests.tiny import tokenizer

EXAMPLES = [
    {"text": "w5 w6", "answer": " w7 w8", "rejected": " w9"},
    {"text": "w10", "answer": " w11", "rejected": " w12 w13"},
]


def prompts(**columns) -> Dataset:
    rows = [{k: v for k, v in e.items() if k != "rejected"} for e in EXAMPLES]
    return from_examples(
        tokenizer(), [row | {k: v[n] for k, v in columns.items()} for n, row in enumerate(rows)]
    )


@pytest.mark.parametrize(
    "columns",
    [
        {"rejected_ids": [[9], [12, 13]]},
        {"rejected": [" w9", " w12 w13"]},
        {"rejected": [" w9", " w12 w13"], "answers": [[7, 20], [11, 21]]},
        {"choices": [[" w7 w8", " w9", " w3"], [" w12 w13", " w11"]]},
    ],
)
def test_the_wrong_answer_is_in_whichever_column_there_is(columns):
    assert wrong_answers_of(tokenizer(), prompts(**columns)) == [[9], [12, 13]]


def test_pairs_name_the_wrong_token():
    clean, corrupted = ["w5 w6", "w7 w8"], ["w5 w9", "w7 w10"]
    made = pairs(tokenizer(), clean, corrupted, answers=[(" w11", " w12"), (" w3", " w4")])
    assert wrong_answers_of(tokenizer(), made) == [[12], [4]]


def test_a_data_set_with_texts_and_answers_will_do():
    plain = Dataset.from_list(EXAMPLES)
    read = as_prompts(tokenizer(), plain)
    assert answers_of(read) == [[7, 8], [11]]
    assert wrong_answers_of(tokenizer(), read) == [[9], [12, 13]]


def test_statements_are_each_answer_behind_its_prompt():
    said = statements(tokenizer(), prompts(choices=[[" w7 w8", " w9", " w3"], [" w12", " w11"]]))
    assert said.token_lists == [[5, 6, 7, 8], [5, 6, 9], [5, 6, 3], [10, 11], [10, 12]]
    assert said.labels == [1, 0, 0, 1, 0] and said.groups == [0, 0, 0, 1, 1]


def test_without_choices_statements_are_two_a_prompt():
    said = statements(tokenizer(), prompts(rejected=[" w9", " w12 w13"]))
    assert said.token_lists == [[5, 6, 7, 8], [5, 6, 9], [10, 11], [10, 12, 13]]
    assert said.labels == [1, 0, 1, 0]


def test_letters_of_a_choice_are_its_statements(mini_llama):
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(mini_llama)
    letters = multiple_choice(reader, n=3, seed=0)
    said = statements(reader, letters)
    assert len(said.labels) == 12 and sum(said.labels) == 3
    for ids, label, group in zip(said.token_lists, said.labels, said.groups):
        row = letters[group]
        assert ids[:-1] == row["input_ids"]
        assert (reader.decode(ids[-1]) == row["answer"].strip()) == bool(label)


@pytest.mark.parametrize(
    "given, said",
    [
        (prompts(), "nothing says what is wrong; give one of .*rejected_ids, rejected"),
        (prompts(rejected=[" w9", ""]), "prompt 1 has no wrong answer in the column 'rejected'"),
        (prompts(rejected=[" w7 w8", " w9"]), "prompt 0 has no wrong answer"),
        (prompts(choices=[[" w7 w8"], [" w9"]]), "prompt 0 has no wrong answer in .*'choices'"),
    ],
)
def test_wrong_answers_that_are_not_there(given, said):
    with pytest.raises(PromptError, match=said):
        wrong_answers_of(tokenizer(), given)


def test_prompts_without_answers():
    for given in (as_prompts(tokenizer(), ["w5 w6"]), as_prompts(tokenizer(), Dataset.from_list(
        [{"text": "w5 w6", "answer": " w7"}, {"text": "w8", "answer": ""}]
    ))):  # fmt: skip
        with pytest.raises(PromptError, match="has no answer; give a data set with the columns"):
            answers_of(given)


def test_a_continuation_that_is_no_token_of_its_own():
    row = prompts()[0]
    assert tokens_after(tokenizer(), row, " w7 w3") == [7, 3]
    with pytest.raises(PromptError, match="'7' does not follow 'w5 w6'.*begin it with the space"):
        tokens_after(tokenizer(), row, "7")
