"""`interp fit`: what it leaves is what the library's `fit` returns, and `interp eval` takes it."""

import json

import pandas as pd
import pytest
import torch

import interp
from interp.cli.fit import share_or_count
from interp.errors import UserError
from interp.intervention.made_on import MadeOn
from tests.test_cli import refused, succeeded
from tests.tiny import unchecked

TASK = ["mini-llama", "--task", "multiple_choice", "--n", 12, "--device", "cpu"]
FITS = {
    "act": ["--heads", "1.0,2.3", "--alpha", 1.5],
    "lofit": ["--k", 2, "--epochs", 1],
    "iti": ["--k", "0.1", "--strength", 3],
}


@pytest.fixture(scope="module")
def mini(mini_llama):
    return interp.load(mini_llama, device="cpu")


@pytest.mark.parametrize("kind", FITS)
def test_a_fit_leaves_a_folder_that_eval_takes(capsys, mini, tmp_path, kind):
    words = [kind, *TASK, *FITS[kind], "--out", tmp_path / "fit", "--json"]
    said = json.loads(succeeded(capsys, "fit", *words))
    edit = interp.load_intervention(tmp_path / "fit", mini)
    assert said["type"] == type(edit).__name__ and said["digest"] == edit.digest
    assert said["heads"] == [str(head) for head in edit.heads]
    assert said["stored_numbers"] == edit.n_stored and edit.made_on == MadeOn.of(mini)
    again = json.loads(succeeded(capsys, "fit", *words))
    assert again["digest"] == edit.digest
    assert "--overwrite" in refused(capsys, "fit", *words[:-1], "--seed", 1)
    other = ["--task", "multiple_choice", "--n", 4, "--seed", 1, "--device", "cpu", "--json"]
    out = ["--intervention", tmp_path / "fit", "--out", tmp_path / "eval"]
    found = json.loads(succeeded(capsys, "eval", "mini-llama", *other, *out))
    assert found["interventions"] == [repr(edit)]
    table = pd.read_parquet(tmp_path / "eval" / "prompts.parquet")
    changed = table.groupby("condition")["loss"].mean()
    assert (changed["none"] != changed["intervention"]) == bool(edit.heads)


def test_iti_is_what_the_library_fits(capsys, mini, tmp_path):
    from interp.cli.prompts import Wanted, prompts_of

    wanted = Wanted("multiple_choice", None, None, 12, 0, allowed=("multiple_choice",))
    expected = interp.ITI.fit(
        mini, prompts_of(mini, wanted), k=0.1, strength=3.0, seed=0, progress=False
    )
    succeeded(capsys, "fit", "iti", *TASK, *FITS["iti"], "--out", tmp_path)
    found = interp.load_intervention(tmp_path)
    assert found.heads == expected.heads
    torch.testing.assert_close(found.directions, expected.directions, atol=1e-5, rtol=1e-4)


def test_heads_are_taken_from_a_file_of_scores(capsys, mini, tmp_path):
    rows = [(layer, head, layer + head / 10) for layer in range(4) for head in range(8)]
    scores = interp.HeadScores(pd.DataFrame(rows, columns=["layer", "head", "score"]))
    scores.save(tmp_path / "heads.parquet")
    words = ["--heads", tmp_path / "heads.parquet", "--k", 2, "--out", tmp_path / "fit"]
    said = succeeded(capsys, "fit", "iti", *TASK, *words)
    edit = interp.load_intervention(tmp_path / "fit")
    assert set(edit.heads) == set(scores.top(2)) and "L3H7" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["act", *TASK, "--heads", "9.0"], "L9H0"),
        (["act", *TASK, "--factor", "2"], "factor=2"),
        (["act", *TASK, "--decode", "later"], "decode='later'"),
        (["lofit", *TASK, "--k", "0"], "k='0'"),
        (["lofit", *TASK, "--k", "many"], "k='many'"),
        (["lofit", *TASK, "--objective", "other"], "objective='other'"),
        (["iti", *TASK, "--direction", "up"], "direction='up'"),
        (["iti", "mini-llama", "--task", "text"], "task='text'"),
        (["iti", "mini-llama", "--task", "repeats", "--lengths", "6"], "choices"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value[-2:])),
)
def test_what_cannot_be_fitted_is_one_line(capsys, tmp_path, arguments, words):
    with unchecked():
        assert words in refused(capsys, "fit", *arguments, "--out", tmp_path / "fit")
    assert not (tmp_path / "fit" / "intervention.json").exists()


@pytest.mark.parametrize(("k", "found"), [("16", 16), ("0.1", 0.1), ("1.0", 1.0)])
def test_a_share_has_a_point(k, found):
    assert share_or_count(k) == found and type(share_or_count(k)) is type(found)


@pytest.mark.parametrize("k", ["0", "-3", "1.5", "0.0", "nan.", "x"])
def test_a_number_of_heads_that_is_none(k):
    with pytest.raises(UserError, match="such as 16"):
        share_or_count(k)
