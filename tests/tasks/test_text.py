"""Plain text from every source, and filler that does not repeat."""

import re
from itertools import islice
from types import SimpleNamespace

import pytest
from datasets import Dataset

from interp.tasks import filler
from interp.tasks.prompts import PromptError, describe
from interp.tasks.text import text

LINE = "The old farmer walked to the small bridge at noon. "


def test_filler_has_the_size_asked_for_and_repeats_no_sentence(tokenizer):
    prompts = text(tokenizer, max_tokens=300, n=3)
    assert [len(ids) for ids in prompts["input_ids"]] == [300] * 3
    for shown in prompts["text"]:
        lines = re.split(r"(?<=\.) ", shown)
        assert len(lines) == len(set(lines))


def test_filler_is_drawn_by_seed(byte_tokenizer):
    one, again, other = (text(byte_tokenizer, n=2, seed=seed) for seed in (0, 0, 1))
    assert one.to_list() == again.to_list() and not set(one["text"]) & set(other["text"])
    assert len(set(one["text"])) == 2


def test_filler_fits_a_small_window(byte_tokenizer):
    model = SimpleNamespace(tokenizer=byte_tokenizer, cfg=SimpleNamespace(n_ctx=64))
    assert {len(ids) for ids in text(model)["input_ids"]} == {64}


def test_filler_sentences_never_repeat():
    lines = list(islice(filler.sentences(3), 5_000))
    assert len(set(lines)) == 5_000
    assert filler.text(100, 3) == " ".join(lines)[: len(filler.text(100, 3))]


def test_sources_give_the_same_prompts(tmp_path, byte_tokenizer):
    texts = [LINE * 4, LINE * 2]
    for name, content in zip(("a.txt", "b.txt"), texts, strict=True):
        (tmp_path / name).write_text(content)
    sources = [texts, Dataset.from_dict({"text": texts}), tmp_path, str(tmp_path)]
    rows = [text(byte_tokenizer, source, max_tokens=12).to_list() for source in sources]
    assert rows[0] == rows[1] == rows[2] == rows[3] and len(rows[0]) > 2
    assert text(byte_tokenizer, tmp_path / "a.txt")["text"] == texts[:1]


def test_n_draws_windows_by_seed(byte_tokenizer):
    drawn = text(byte_tokenizer, LINE * 30, max_tokens=12, n=3, seed=1)
    assert len(drawn) == 3
    assert drawn.to_list() == text(byte_tokenizer, LINE * 30, 12, 3, 1).to_list()
    assert describe(drawn)["parameters"] == {"source": "str", "max_tokens": 12, "n": 3, "seed": 1}
    with pytest.raises(PromptError, match="n=3: the source has 1 windows"):
        text(byte_tokenizer, LINE, n=3)


def test_errors_name_the_file(tmp_path, byte_tokenizer):
    for name, content, words in [
        ("empty.txt", b"", "empty"),
        ("binary.txt", b"\x7fELF\0", "binary"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text .byte 0xe9 at 3"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError, match=f"{name}: .*{words}"):
            text(byte_tokenizer, tmp_path / name)
    with pytest.raises(PromptError, match=r"corpus.txt: no such file"):
        text(byte_tokenizer, "corpus.txt")  # a forgotten file is not a text of one word


def test_a_file_longer_than_the_window_asks_for_max_tokens(tmp_path, byte_tokenizer):
    model = SimpleNamespace(tokenizer=byte_tokenizer, cfg=SimpleNamespace(n_ctx=32))
    (tmp_path / "long.txt").write_text(LINE * 30)
    with pytest.raises(PromptError, match=r"prompt 0: .* window has 32; pass max_tokens=32"):
        text(model, tmp_path / "long.txt")
    assert len(text(model, tmp_path / "long.txt", max_tokens=32)) > 1


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, byte_tokenizer):
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfThe farmer")
    assert text(byte_tokenizer, tmp_path)["text"] == ["The farmer"]
