"""Needle prompts: exact spans on every kind of tokenizer, lengths kept, one clear error each."""

from collections import Counter
from types import SimpleNamespace

import pytest

from interp.tasks.needle import Needle, NeedleError, needle, split
from interp.tasks.prompts import PromptError, describe
from interp.tasks.text import read_texts

# shares of letters are enough: some tokenizers lower case, some drop white space
BARE = str.maketrans("", "", " \n▁Ġ")


def bare(text):
    return text.translate(BARE).lower()


def shown(tokenizer, row, name):
    start, end = row["spans"][name]
    return bare(tokenizer.decode(row["input_ids"][start:end]))


def lengths_for(tokenizer):
    """Lengths that hold the needle: tokenizers of letters need more of them."""
    least = len(tokenizer("The secret code of Robert is mountain feather mountain.").input_ids)
    return [10 * least, 16 * least]


@pytest.mark.parametrize("needles", [1, 3])
def test_every_span_decodes_to_what_it_names(tokenizer, needles):
    prompts = needle(tokenizer, lengths_for(tokenizer), depths=3, n=12, needles=needles)
    for row in prompts:
        statement = bare(f"The secret code of {row['owner']} is{row['answer']}.")
        # with a tokenizer that merges "e." a span may have one token that straddles its edge
        assert shown(tokenizer, row, "needle") == statement
        assert shown(tokenizer, row, "answer") in (bare(row["answer"]), bare(row["answer"]) + ".")
        question = bare(f"Question: What is the secret code of {row['owner']}?")
        assert shown(tokenizer, row, "question") == question
        for start, end in row["distractors"] if needles > 1 else []:
            other = bare(tokenizer.decode(row["input_ids"][start:end]))
            assert other.startswith(bare("The secret code of ")) and other.endswith(".")
            assert other != statement


def test_the_answer_is_what_follows_the_prompt(tokenizer):
    for row in needle(tokenizer, lengths_for(tokenizer)[:1], n=3):
        whole = tokenizer(row["text"] + row["answer"]).input_ids
        together = row["input_ids"] + row["answer_ids"]
        assert whole[: len(together)] == together
        assert len(whole) - len(together) in (0, 1)  # [SEP] or </s>
        start, end = row["spans"]["answer"]
        span, answer = row["input_ids"][start:end], row["answer_ids"]
        assert span[:-1] == answer[: len(span) - 1]  # the last may be merged with the full stop


def test_no_prompt_is_longer_than_asked_nor_a_sentence_shorter(tokenizer):
    lengths = lengths_for(tokenizer)
    sentence = "The careful neighbor thought about the wooden harbor without a word."
    slack = len(tokenizer(sentence).input_ids) + 6
    for row in needle(tokenizer, lengths, n=8):
        size = len(row["input_ids"]) + len(row["answer_ids"])
        assert row["length"] - slack < size <= row["length"]


def test_deeper_needles_stand_later(byte_tokenizer):
    prompts = needle(byte_tokenizer, 400, depths=5, n=5)
    starts = [row["spans"]["needle"][0] for row in prompts]
    assert prompts["depth"] == [0, 0.25, 0.5, 0.75, 1]
    assert starts == sorted(starts) and starts[0] == 0 and len(set(starts)) == 5
    last = prompts[4]
    end, question = last["spans"]["needle"][1], last["spans"]["question"][0]
    assert not byte_tokenizer.decode(last["input_ids"][end:question]).strip()


@pytest.mark.parametrize("n", [1, 4, 6, 20])
def test_n_prompts_are_spread_evenly_over_the_grid(byte_tokenizer, n):
    prompts = needle(byte_tokenizer, [200, 300], depths=3, n=n)
    cells = Counter(zip(prompts["length"], prompts["depth"], strict=True))
    assert len(prompts) == n
    assert len(cells) == min(n, 6) and max(cells.values()) - min(cells.values()) <= 1


def test_a_seed_gives_the_same_prompts_and_another_seed_others(byte_tokenizer):
    one, again, other = (needle(byte_tokenizer, 200, n=4, seed=seed) for seed in (1, 1, 2))
    assert one.to_list() == again.to_list()
    assert describe(one) == describe(again)
    assert not set(one["text"]) & set(other["text"])
    assert describe(one)["sha256"] != describe(other)["sha256"]


def test_no_sentence_and_no_word_of_a_code_stands_twice(byte_tokenizer):
    for row in needle(byte_tokenizer, 1500, n=4, needles=4):
        lines = row["text"].partition(" Question")[0].split(". ")
        assert len(lines) == len(set(lines))
        codes = [line.partition(" is ")[2].rstrip(".") for line in lines if " code of " in line]
        words = " ".join(codes).split()
        assert len(codes) == 4 and len(words) == len(set(words)) == 12


def test_in_a_chat_the_spans_move_along(byte_tokenizer):
    prompts = needle(byte_tokenizer, 300, n=3, chat=True)
    for row in prompts:
        assert row["text"].startswith("<|user|>\n")
        assert row["text"].endswith(f"<|assistant|>\nThe secret code of {row['owner']} is")
        assert shown(byte_tokenizer, row, "answer") == bare(row["answer"])
        assert len(row["input_ids"]) + len(row["answer_ids"]) <= 300
    assert describe(prompts)["tokens"]["chat"] is True


def test_a_chat_without_template_is_an_error(byte_tokenizer):
    byte_tokenizer = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(PromptError, match="no chat template"):
        needle(byte_tokenizer, 300, n=1, chat=True)


def test_a_wording_of_ones_own(byte_tokenizer):
    wording = Needle(
        statement="The best thing to do in the harbor is {answer}, says {owner}.",
        question="The best thing to do in the harbor is",
        owners=("Emma",),
        codewords=("drink tea and look at ships", "sleep"),
    )
    row = needle(byte_tokenizer, 200, n=1, n_words=1, wording=wording)[0]
    assert row["answer"] in (" drink tea and look at ships", " sleep")
    assert f"harbor is{row['answer']}, says Emma." in row["text"]
    assert row["text"].endswith("harbor is")


def test_the_haystack_may_be_a_folder_read_in_order_of_names(tmp_path, byte_tokenizer):
    (tmp_path / "b.txt").write_text("Dogs bark at night. " * 40)
    (tmp_path / "a.txt").write_text('"Cats purr." ' * 40 + "no full stop here " * 40)
    assert [*read_texts(tmp_path)] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    prompts = needle(byte_tokenizer, [150, 250], n=6, haystack=tmp_path)
    for row in prompts:
        assert "Cats purr." in row["text"] or "Dogs bark" in row["text"] or "stop" in row["text"]
        assert shown(byte_tokenizer, row, "answer") == bare(row["answer"])
        assert len(row["input_ids"]) + len(row["answer_ids"]) <= row["length"]


def test_sentences_are_cut_at_full_stops_and_never_too_long():
    assert split('He said "no." She left.\n\nA title\n\nEnd') == [
        'He said "no."', "She left.", "A title", "End",
    ]  # fmt: skip
    assert [len(piece.split()) for piece in split("word " * 130)] == [60, 60, 10]


def test_a_haystack_that_cannot_be_used_is_named(tmp_path, byte_tokenizer):
    def error(path):
        with pytest.raises(PromptError) as caught:
            needle(byte_tokenizer, 400, n=1, haystack=path)
        return str(caught.value)

    assert "no such file" in error(tmp_path / "none.txt")
    assert "no .txt file" in error(tmp_path)
    for name, content, words in [
        ("empty.txt", b"  \n", "empty"),
        ("binary.txt", b"PK\0\1", "binary"),
        ("latin.txt", "Café".encode("latin-1"), "not UTF-8"),
        ("short.txt", b"One. Two. Three.", "too little text"),
        ("one.txt", b"One", "too little text"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert words in error(tmp_path / name) and name in error(tmp_path / name)


def test_a_needle_that_does_not_fit_says_what_it_needs(byte_tokenizer):
    with pytest.raises(NeedleError, match=r"does not fit in 30 tokens.* needs \d+"):
        needle(byte_tokenizer, [30], n=1)
    with pytest.raises(NeedleError, match=r"does not fit in 120 tokens.* fewer needles"):
        needle(byte_tokenizer, [120], n=1, needles=8)


def test_what_cannot_be_asked_for(byte_tokenizer):
    model = SimpleNamespace(tokenizer=byte_tokenizer, cfg=SimpleNamespace(n_ctx=256))
    for words, arguments in {
        "context window has 256": {"lengths": [128, 512]},
        "lengths: none": {"lengths": []},
        "from 0 to 1": {"depths": [0, 50, 100]},
        "depths=0": {"depths": 0},
        "n=0": {"n": 0},
        "78 codewords": {"n_words": 40, "needles": 2},
        "14 owners": {"needles": 15},
        "n_words=0": {"n_words": 0},
    }.items():
        with pytest.raises(NeedleError, match=words):
            needle(model, **{"lengths": [200], **arguments})


@pytest.mark.parametrize(
    "wrong",
    [
        {"statement": "No place for it."},
        {"question": "Is it {answer}?"},
        {"owners": ()},
    ],
)
def test_a_wording_that_cannot_work_is_refused(wrong):
    with pytest.raises(NeedleError, match=r"answer|owner"):
        Needle(**wrong)


def test_prompts_fill_the_window_to_the_last_token_but_never_pass_it(byte_tokenizer):
    model = SimpleNamespace(tokenizer=byte_tokenizer, cfg=SimpleNamespace(n_ctx=256))
    assert len(needle(model, 256, n=4)) == 4
