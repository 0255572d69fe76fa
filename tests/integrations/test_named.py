"""Interventions as a harness' command line names them."""

import pytest

import interp
from interp.integrations.named import named_interventions, record
from interp.intervention.base import InterventionError

ONE, OTHER = interp.Ablate(["L0H1"]), interp.Ablate(["L1H2"], "uniform")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """`one`, `3` and `a:b`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, edit in {"one": ONE, "3": OTHER, "a:b": OTHER}.items():
        edit.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, []),
        ("", []),
        ("one", [ONE]),
        ("one:3", [ONE, OTHER]),
        ("3:one:", [OTHER, ONE]),
        ("a:b", [OTHER]),  # there is such a folder
        (3, [OTHER]),  # as the harness reads it
        (["one", OTHER], [ONE, OTHER]),
        (ONE, [ONE]),
    ],
)
def test_folders_are_joined_by_a_colon(folders, given, expected):
    assert named_interventions(given) == expected


def test_a_folder_that_is_not_there_is_named(folders):
    with pytest.raises(InterventionError, match="'two': no intervention.json"):
        named_interventions("one:two")


def test_a_record_tells_one_from_the_other():
    assert record(ONE) == {"type": "Ablate", "digest": ONE.digest, "words": repr(ONE)}
    assert record(ONE) != record(OTHER)
    assert record(object())["digest"] == ""
