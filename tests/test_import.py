"""`import interp` and `interp --help` are quick, and the public names are where they should be."""

import subprocess
import sys

import pytest

import interp

HEAVY = ("torch", "transformers", "pandas", "plotly", "transformer_lens", "datasets", "numpy")


def modules_imported_by(*arguments: str) -> set[str]:
    """The packages that a fresh Python imports for `arguments`."""
    command = [sys.executable, "-X", "importtime", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    names = (line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines())
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import interp"],
        ["-m", "interp", "--help"],
        ["-m", "interp", "models", "get", "--help"],
        ["-m", "interp", "models"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments):
    found = modules_imported_by(*arguments)
    assert "interp" in found
    assert not found & set(HEAVY)


def test_dir_lists_the_public_names():
    assert {"load", "attention", "Ablate", "HeadScores", "tasks", "__version__"} <= set(dir(interp))
    assert set(interp.__all__) <= set(dir(interp))


@pytest.mark.parametrize("name", interp.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(interp, name) is getattr(interp, name)


def test_the_names_and_their_homes_agree():
    assert {*interp._HOMES, "metrics", "report", "tasks", "__version__"} == set(interp.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        interp.lode  # noqa: B018


def test_the_version_is_a_string():
    assert interp.__version__.count(".") == 2
