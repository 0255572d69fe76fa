"""Building and checking prompts: spans, answers, chat, provenance, and what is refused."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from interp.tasks.prompts import (
    PromptError,
    SpanError,
    as_prompts,
    describe,
    encode,
    from_examples,
    token_span,
    windows,
)
from tests.tasks.conftest import tokenizer_named

LETTERS = st.text("abe.é漢 🙂\n'", min_size=1, max_size=24).filter(str.strip)


@pytest.mark.parametrize("name", ["bytes", "bytes, trimmed", "metaspace", "wordpiece"])
@given(text=LETTERS, data=st.data())
def test_a_span_has_every_token_that_shares_a_character_and_no_other(name, text, data):
    tokenizer = tokenizer_named(name)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    encoded = encode(tokenizer, text)
    by_hand = [
        i for i, (a, b) in enumerate(encoded.offsets) if set(range(a, b)) & set(range(start, end))
    ]
    if not by_hand:  # white space that the tokenizer drops
        return
    assert token_span(tokenizer, encoded, start, end) == (by_hand[0], by_hand[-1] + 1)


@given(before=LETTERS, middle=LETTERS, after=LETTERS)
def test_without_offsets_the_span_is_found_by_prefixes(before, middle, after):
    tokenizer = tokenizer_named("without offsets")  # a token is a byte: the span is exact
    encoded = encode(tokenizer, before + middle + after)
    start, end = token_span(tokenizer, encoded, len(before), len(before + middle))
    assert tokenizer.decode(encoded.ids[start:end]) == middle


@pytest.mark.parametrize("name", ["bytes", "metaspace"])
def test_offsets_and_prefixes_find_the_same_words(name):
    tokenizer = tokenizer_named(name)
    text = "The code is stone. The old farmer left the tower."
    encoded = encode(tokenizer, text)
    blind = replace(encoded, offsets=None)
    for word in re.finditer(r"\w+", text):  # "stone" ends inside a token, "e."
        by_offsets = token_span(tokenizer, encoded, *word.span())
        assert token_span(tokenizer, blind, *word.span())[1] == by_offsets[1]


def test_a_token_that_straddles_the_edge_is_in_the_span():
    tokenizer = tokenizer_named("metaspace")
    text = "The code is stone. The old farmer"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert any(token.endswith(".") and len(token) > 1 for token in tokens), tokens  # else no test
    row = from_examples(tokenizer, [{"text": text, "char_spans": {"word": "stone"}}])[0]
    start, end = row["spans"]["word"]
    assert "".join(tokens[start:end]).replace("▁", "") == "stone."


def test_a_prompt_keeps_its_closing_token_unless_an_answer_follows():
    tokenizer = tokenizer_named("wordpiece")
    plain, asked = (
        from_examples(tokenizer, [{"text": "the old farmer left", "answer": answer}])[0]
        for answer in ("", " the bridge")
    )
    assert plain["input_ids"] == tokenizer("the old farmer left").input_ids
    assert plain["input_ids"][-1] == 3 and asked["input_ids"] == plain["input_ids"][:-1]
    assert plain["spans"] == {"text": [1, len(plain["input_ids"]) - 1]}
    assert tokenizer.decode(asked["answer_ids"]) == "the bridge"


def test_an_answer_that_merges_with_the_prompt_is_named(byte_tokenizer):
    fine = {"text": "The old farmer walked to the", "answer": " small bridge"}
    with pytest.raises(PromptError, match=r"prompt 1: its end .*walked to the ' and .*merge"):
        from_examples(
            byte_tokenizer, [fine, {"text": "The old farmer walked to the ", "answer": "small"}]
        )


@pytest.mark.parametrize("place", ["tea", "o", "", (30, 50), (4, 4), (-3, 2)])
def test_a_span_that_is_not_there_says_which_prompt_and_why(byte_tokenizer, place):
    good = {"text": "The old farmer", "char_spans": {"who": "farmer"}}
    with pytest.raises(SpanError, match=r"prompt 1, span 'who': .*(occurs|not in the text)"):
        from_examples(byte_tokenizer, [good, {"text": "too old", "char_spans": {"who": place}}])


def test_other_columns_are_carried_along(byte_tokenizer):
    row = from_examples(
        byte_tokenizer,
        [{"text": "Is it?", "answer": " yes", "choices": [" yes", " no"], "target": 0}],
    )[0]
    assert row["choices"] == [" yes", " no"] and row["target"] == 0
    assert "reply" not in row and "char_spans" not in row


def test_a_span_that_reaches_into_the_reply_cannot_be_told_in_a_chat(byte_tokenizer):
    example = {"text": "Who? It is", "reply": "It is", "char_spans": {"all": (0, 10)}}
    assert len(from_examples(byte_tokenizer, [example]))
    with pytest.raises(SpanError, match="prompt 0, span 'all': it reaches into the reply"):
        from_examples(byte_tokenizer, [example], chat=True)


def test_in_a_chat_an_answer_begins_the_turn_without_space(byte_tokenizer):
    example = {"text": " Who left? ", "answer": " Emma", "char_spans": {"verb": "left"}}
    row = from_examples(byte_tokenizer, [example], chat=True)[0]
    assert row["text"] == "<|user|>\nWho left?\n<|assistant|>\n" and row["answer"] == "Emma"
    start, end = row["spans"]["verb"]
    assert byte_tokenizer.decode(row["input_ids"][start:end]).strip() == "left"


@pytest.mark.parametrize(
    "given_as",
    [
        lambda texts: texts,
        tuple,
        lambda texts: [{"text": text} for text in texts],
        lambda texts: Dataset.from_dict({"text": texts, "label": [0, 1]}),
    ],
)
def test_texts_come_as_list_or_data_set(byte_tokenizer, given_as):
    texts = ["The old farmer left.", "At noon"]
    prompts = as_prompts(byte_tokenizer, given_as(texts))
    assert prompts["text"] == texts
    assert prompts["input_ids"] == [byte_tokenizer(text).input_ids for text in texts]
    assert as_prompts(byte_tokenizer, prompts) is prompts


def test_one_text_is_one_prompt(byte_tokenizer):
    assert len(as_prompts(byte_tokenizer, "The old farmer")) == 1


def small_model(tokenizer):
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=12, d_vocab=600))


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([], "the list is empty"),
        ("", "prompt 0: the text is empty"),
        (["fine", " \n"], "prompt 1: the text is empty"),
        (["fine", "PK\0\1"], "prompt 1: binary data"),
        (["\udcff"], "prompt 0: binary data"),
        ([b"bytes"], "prompt 0: bytes is not text"),
        (b"bytes", "bytes is none of"),
        ([3], "prompt 0: int is not text"),
        (17, "int is none of"),
        (Path("corpus.txt"), r"interp.tasks.text"),
        (["fine", "The farmer " * 9], "prompt 1: .* window has 12; pass max_tokens=12"),
        (Dataset.from_dict({"texts": ["a"]}), r"no column 'text' .*rename_column\('texts', 'text"),
        (Dataset.from_dict({"n": [1], "body": ["a"]}), r"rename_column\('body', 'text'\)"),
        (Dataset.from_dict({"n": [1]}), r"no column 'text' \(it has n\)\.$"),
        (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), r"one of its splits \(train\)"),
        (Dataset.from_dict({"text": []}), "empty"),
        (Dataset.from_dict({"input_ids": [[1], []]}), "prompt 1: it has no tokens"),
        (Dataset.from_dict({"input_ids": [[1, 9999]]}), "another model's tokenizer"),
    ],
)
def test_what_cannot_be_prompts_is_told_in_one_line(byte_tokenizer, prompts, words):
    with pytest.raises(PromptError, match=words) as caught:
        as_prompts(small_model(byte_tokenizer), prompts)
    assert "\n" not in str(caught.value)


def test_what_has_no_tokenizer_is_named():
    with pytest.raises(PromptError, match="SimpleNamespace has no Hugging Face tokenizer"):
        as_prompts(SimpleNamespace(tokenizer=None), ["a"])


def test_max_tokens_cuts_texts_but_not_questions(tokenizer):
    text = "The old farmer walked to the small bridge at noon. " * 3
    whole = tokenizer(text).input_ids
    row = as_prompts(tokenizer, [text], max_tokens=9)[0]
    assert len(row["input_ids"]) == 9 and row["input_ids"][:7] == whole[:7]
    assert text.startswith(row["text"])
    with pytest.raises(PromptError, match="prompt 0 has an answer"):
        as_prompts(tokenizer, [{"text": text, "answer": " x"}], max_tokens=9)
    with pytest.raises(PromptError, match="max_tokens=0"):
        as_prompts(tokenizer, [text], max_tokens=0)


def test_windows_are_consecutive_tokens_of_the_text(tokenizer):
    text = "The old farmer walked to the small bridge at noon. " * 5
    whole = encode(tokenizer, text)
    pieces = list(windows(tokenizer, text, 10))
    inner = [w["input_ids"][slice(*w["spans"]["text"])] for w in pieces]
    joined = [token for piece in inner for token in piece]
    assert joined == whole.ids[whole.before :][: len(joined)] and len(pieces) > 2
    assert all(len(w["input_ids"]) == 10 for w in pieces)


def test_description_survives_disk_and_changes_with_the_rows(tmp_path, byte_tokenizer):
    prompts = from_examples(byte_tokenizer, [{"text": "a b"}, {"text": "c"}], task="mine")
    about = describe(prompts)
    assert about["task"] == "mine" and about["n"] == 2 and len(about["sha256"]) == 64
    prompts.save_to_disk(tmp_path / "kept")
    assert describe(load_from_disk(tmp_path / "kept")) == about
    assert describe(prompts.select([1]))["sha256"] != about["sha256"]
    other = from_examples(byte_tokenizer, [{"text": "d"}], task="other")
    assert describe(concatenate_datasets([prompts, other]))["task"] == "mine + other"
    assert describe(Dataset.from_dict({"input_ids": [[1]]}))["task"] == "data set"


def test_the_hash_of_known_rows_is_known():
    """It goes into saved results: a change of it is a change of format."""
    rows = Dataset.from_list([{"text": "é", "input_ids": [1, 2], "spans": {"text": [0, 2]}}])
    line = b'{"input_ids": [1, 2], "spans": {"text": [0, 2]}, "text": "\\u00e9"}\n'
    assert describe(rows)["sha256"] == hashlib.sha256(line).hexdigest()


def test_the_token_policy_names_what_is_added():
    tokens = describe(as_prompts(tokenizer_named("metaspace"), ["a"]))["tokens"]
    assert tokens["before"] == ["<s>"] and tokens["after"] == ["</s>"] and not tokens["chat"]
