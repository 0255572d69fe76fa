"""The shipped text model: plain transformers loads it, and it still does what its card says."""

import importlib.util
import json
import random
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
LEARNT = [name for name, row in RECORDED["tasks"].items() if row["low"] > row["chance"]]
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


@pytest.mark.parametrize("generator", [ioi, colored_objects, multiple_choice])
def test_the_corrupted_prompt_is_answered_otherwise(script, model, tokenizer, generator):
    examples = generator(N, seed=1)
    clean = [(e["text"], e["answer"]) for e in examples]
    corrupted = [(e["corrupted_text"], e["corrupted_answer"]) for e in examples]
    right = script.is_right(model, tokenizer, clean + corrupted)
    chance = sum(1 / len(e["choices"]) for e in examples) / N
    assert sum(right[:N]) / N > chance and sum(right[N:]) / N > chance
    assert not any(script.is_right(model, tokenizer, [(t, e["answer"]) for (t, _), e, ok in zip(
        corrupted, examples, right[N:], strict=True) if ok]))
