"""Commands on a model that sees images, on our scenes and on the user's own pictures."""

import json

import pandas as pd
import pytest
from PIL import Image

import interp
from interp.heads import HeadScores
from tests.test_cli import refused, succeeded

MODEL = ["mini-llava", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path):
    """A .jsonl file of one question, and its picture."""
    Image.new("RGB", (48, 48), "black").save(tmp_path / "black.png")
    row = {"image": "black.png", "question": "Describe the image.", "answer": " The image shows"}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row))
    return path


@pytest.mark.parametrize("command", ["vhd", "visual-sinks"])
def test_scores_are_kept_and_a_run_goes_on(capsys, tmp_path, command, pictures):
    words = ["score", command, *MODEL, "--n", 4, "--out", tmp_path / "run", "--json"]
    said = json.loads(succeeded(capsys, *words))
    scores = HeadScores.load(tmp_path / "run" / "heads.parquet")
    assert len(said["heads"]) == len(scores) == 32
    assert json.loads(succeeded(capsys, *words))["heads"] == said["heads"]
    assert "--overwrite" in refused(capsys, *words, "--seed", 1)
    own = ["--data", pictures] + ["--task", "pictured"] * (command == "visual-sinks")
    out = ["--out", tmp_path / "own", "--json"]
    assert len(json.loads(succeeded(capsys, "score", command, *MODEL, *own, *out))["heads"]) == 32


def test_eval_asks_about_pictures_and_an_edit_acts(capsys, tmp_path, pictures):
    interp.Ablate([f"L0H{head}" for head in range(8)]).save_pretrained(tmp_path / "edit")
    words = ["eval", *MODEL, "--task", "scenes", "--n", 8, "--json"]
    found = json.loads(succeeded(capsys, *words, "--intervention", tmp_path / "edit"))
    table = pd.DataFrame(found["conditions"]).set_index(["condition", "metric"])["value"]
    assert table["intervention", "loss"] > table["none", "loss"] + 0.5
    own = ["--task", "pictured", "--data", pictures]
    assert json.loads(succeeded(capsys, "eval", *MODEL, *own, "--json"))["conditions"]
    succeeded(capsys, "eval", *MODEL, "--task", "polls", "--n", 2)


def test_what_cannot_be_seen_is_told(capsys, tmp_path, mini_llama, pictures):
    assert "image" in refused(capsys, "score", "vhd", mini_llama, "--out", tmp_path / "x")
    assert "--data" in refused(capsys, "eval", *MODEL, "--task", "pictured")
    (pictures.parent / "black.png").unlink()
    words = ["--task", "pictured", "--data", pictures]
    assert "black.png" in refused(capsys, "eval", *MODEL, *words)
