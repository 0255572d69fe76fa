"""Each notebook's .ipynb is what jupytext makes of the .py beside it."""

import jupytext
import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_ipynb_belongs_to_the_script(script):
    made = [cell.source for cell in jupytext.read(script).cells]
    kept = [cell.source for cell in jupytext.read(script.with_suffix(".ipynb")).cells]
    assert made == kept, "run `make notebooks`"
