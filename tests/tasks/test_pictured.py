"""Prompts from the user's own images and questions."""

import json

import pytest
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from interp.evaluation import evaluate
from interp.model.images import ImageError
from interp.tasks import pictured
from interp.tasks.prompts import PromptError
from tests.model import vision_families as vision


@pytest.fixture(scope="module")
def model():
    return vision.tiny("llava")


@pytest.fixture
def file(tmp_path):
    """Two questions about pictures that lie beside them."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "images" / "red.png")
    Image.new("L", (9, 9), 100).save(tmp_path / "images" / "grey.png")
    rows = [
        {"image": "images/red.png", "question": "w3 w4", "answer": " w5", "from": "me"},
        {"image": "images/grey.png", "question": "w6", "answer": " w7", "from": "you"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_a_file_and_its_rows_are_the_same_prompts(model, file, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    prompts = pictured(model, file)
    assert prompts["from"][:] == ["me", "you"] and prompts[0]["image"].size == (20, 30)
    rows = [
        {"image": prompts[n]["image"], "question": q, "answer": a}
        for n, (q, a) in enumerate([("w3 w4", " w5"), ("w6", " w7")])
    ]
    again = pictured(model, Dataset.from_list(rows).cast_column("image", ImageColumn()))
    assert again["input_ids"][:] == prompts["input_ids"][:]
    assert again["answer_ids"][:] == prompts["answer_ids"][:]
    start, end = prompts[0]["spans"]["image"]
    assert set(prompts[0]["input_ids"][start:end]) == {model.original_model.config.image_token_id}
    assert len(evaluate(model, prompts, progress=False).table) == 2


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ({"image": "gone.png", "question": "w3"}, ImageError, "prompt 0.*gone.png"),
        ({"question": "w3"}, PromptError, "prompt 0.*no image"),
        ({"image": "images/red.png"}, PromptError, "prompt 0.*no question"),
        (["w3"], PromptError, "line 1"),
    ],
)
def test_a_row_that_lacks_something_is_named(model, file, row, error, match):
    file.write_text(json.dumps(row))
    with pytest.raises(error, match=match):
        pictured(model, file)


def test_other_bad_input(model, file, tmp_path):
    with pytest.raises(PromptError, match="no such file"):
        pictured(model, tmp_path / "none.jsonl")
    file.write_text("{")
    with pytest.raises(PromptError, match="line 1 is no JSON"):
        pictured(model, file)
    with pytest.raises(PromptError, match="empty"):
        pictured(model, [])
