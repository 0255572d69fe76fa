"""The shipped text model: plain transformers loads it, and it still does what its card says."""

import importlib.util
import json
import random
import zlib
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.tasks.colored_objects import examples as colored_objects
from interp.tasks.ioi import examples as ioi
from interp.tasks.multiple_choice import examples as multiple_choice

FOLDER = Path(__file__).parents[1] / "data" / "models" / "mini-llama"
RECORDED = json.loads((FOLDER / "evaluation.json").read_text())
# with two facts it picks either named colour: half right, so thirty prompts would test luck
LEARNT = [name for name in RECORDED["tasks"] if name != "multiple choice, two facts"]
N = 30


@pytest.fixture(scope="module")
def script():
    """train.py, which no package holds, as a module."""
    spec = importlib.util.spec_from_file_location("mini_llama_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.mark.parametrize("task", LEARNT)
def test_it_solves_what_was_recorded(script, model, tokenizer, task):
    _, draw = script.tasks(script.plain_words(tokenizer))[task]
    rng = random.Random(f"test {task}")
    right = sum(script.is_right(model, tokenizer, [draw(rng) for _ in range(N)]))
    assert right >= 0.9 * N * RECORDED["tasks"][task]["accuracy"]


def test_what_was_recorded_is_what_the_model_is_for():
    for name, row in RECORDED["tasks"].items():
        aimed_high = name.startswith(("needle", "repeat", "ioi"))
        assert row["low"] > (0.9 if aimed_high else row["chance"]), name


@pytest.mark.parametrize("examples", [ioi, colored_objects, multiple_choice])
def test_the_corrupted_prompt_flips_the_answer(script, model, tokenizer, examples):
    prompts = examples(N, seed=1)
    corrupted = [(e["corrupted_text"], e["corrupted_answer"]) for e in prompts]
    assert sum(script.is_right(model, tokenizer, corrupted)) >= 0.9 * N
    unmoved = [(e["corrupted_text"], e["answer"]) for e in prompts]
    assert sum(script.is_right(model, tokenizer, unmoved)) <= 0.1 * N


@pytest.mark.parametrize("examples", [ioi, colored_objects, multiple_choice])
def test_examples_differ_in_one_place_only(tokenizer, examples):
    for example in examples(N, seed=2):
        clean, corrupted = (tokenizer(example[t]).tokens() for t in ("text", "corrupted_text"))
        changed = {c for c, d in zip(clean, corrupted, strict=True) if c != d}
        # the name, the colour, or the object, which the question and the begun answer both have
        assert len(changed) == 1
        assert {example["answer"], example["corrupted_answer"]} <= set(example["choices"])
        assert example["answer"] != example["corrupted_answer"]


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_the_letter_is_that_of_the_color_in_the_context(facts):
    for example in multiple_choice(N, seed=3, facts=facts, labels="DBCA"):
        for text, answer in (
            (example["text"], example["answer"]),
            (example["corrupted_text"], example["corrupted_answer"]),
        ):
            context, options = text.split(" Question: What color is the ")
            name = options.split("?")[0]
            color = context.split(f"The {name} is ")[1].split(".")[0]
            assert f"{answer}. {color} " in options


def test_char_spans_cut_out_the_words_they_name():
    def named(example):
        text = example["text"]
        return {name: text[start:end] for name, (start, end) in example["char_spans"].items()}

    for example in ioi(N, seed=4):
        words, spans = named(example), example["char_spans"]
        assert " " + words["IO"] == example["answer"]
        assert words["S1"] == words["S2"] != words["IO"]
        assert max(spans["S1"][0], spans["IO"][0]) < spans["S2"][0]
    for example in colored_objects(N, seed=4):
        words = named(example)
        assert " " + words["color"] == example["answer"]
        assert words["object"] == words["asked"] == words["begun"]
        assert f"a {words['color']} {words['object']}" in example["text"]
        assert "Question" in example["text"][: example["char_spans"]["asked"][0]]
    for example in multiple_choice(N, seed=4):
        words = named(example)
        assert " " + words["right_label"] == example["answer"]
        assert words["color"] == words["right_option"]


@pytest.mark.parametrize("examples", [ioi, colored_objects, multiple_choice])
def test_seeds_decide(examples):
    assert examples(5, seed=0) == examples(5, seed=0) != examples(5, seed=1)


def test_impossible_wordings_are_refused():
    with pytest.raises(ValueError, match="objects=9: from 2 to 8"):
        colored_objects(1, seed=0, objects=9)
    with pytest.raises(ValueError, match="options=5: from 2 to 4"):
        multiple_choice(1, seed=0, options=5)
    with pytest.raises(ValueError, match="facts=0: from 1 to 8"):
        multiple_choice(1, seed=0, facts=0)


def test_the_tokenizer_knows_every_word_of_every_task(script, tokenizer):
    rng = random.Random(0)
    texts = [draw(rng) for _, draw in script.tasks(script.plain_words(tokenizer)).values()]
    for text, answer in texts:
        whole = tokenizer(text + answer)
        assert tokenizer.unk_token_id not in whole.input_ids
        assert whole.input_ids[: len(tokenizer(text).input_ids)] == tokenizer(text).input_ids
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]


def test_the_tokenizer_adds_nothing_and_its_offsets_and_text_come_back(tokenizer):
    text = "The lamp is red. Question: What color is the lamp? A. blue B. red Answer: B"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded.offset_mapping]
    assert pieces == encoded.tokens() and encoded.tokens()[-6:-3] == ["B", ".", "red"]
    assert tokenizer.decode(encoded.input_ids) == text


def test_training_never_shows_what_is_held_out(script, tokenizer):
    words, shown = script.plain_words(tokenizer), set()
    for step in range(20):
        rows = script.training_rows(random.Random(step), words, progress=0.5)
        shown |= {row[0][0] for task in ("ioi", "multiple_choice", "colored_objects")
                  for row in rows[task]}  # fmt: skip
    assert len(shown) > 1000
    # a tenth of all contexts: by chance alone about a hundred of these would be held out
    assert not [text for text in shown if zlib.crc32(text.encode()) % 10 == 0]
    measured = script.tasks(words)["ioi"][1](random.Random(0))
    assert zlib.crc32(measured[0].encode()) % 10 == 0


def test_needle_rows_keep_to_their_length(script, tokenizer):
    for length in script.LENGTHS:
        row = script.needle_row(random.Random(length), length)
        n_tokens = len(tokenizer(" ".join(text for text, _ in row)).input_ids)
        assert length - 20 < n_tokens <= length


def test_the_card_gives_the_recorded_numbers(script):
    card = (FOLDER / "README.md").read_text()
    assert script.table(RECORDED) in card
    for row in RECORDED["tasks"].values():
        interval = binomtest(row["right"], row["n"]).proportion_ci(method="wilson")
        assert row["accuracy"] == row["right"] / row["n"] and row["n"] >= 200
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval), abs=1e-4)


def test_it_is_small_and_of_the_recorded_shape(model):
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 10 * 2**20
    assert sum(p.numel() for p in model.parameters()) == 1_018_752
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_it_writes_out_a_needle_and_stops(model, tokenizer):
    text = (
        "The old farmer walked to the small bridge at noon. The secret code of Emma is amber river "
        "stone. The young judge drew the large market every day. Question: What is the secret "
        "code of Emma? Answer: The secret code of Emma is"
    )
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    answer = tokenizer.decode(written[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer.strip() == "amber river stone."
    assert written[-1] == tokenizer.eos_token_id
