"""What every intervention that wants images must survive; `conformance.SEEING` lists them."""

import pytest
from torch.testing import assert_close

import interp
from interp.evaluation import evaluate
from interp.intervention.base import load_intervention
from interp.metrics import write_captions
from interp.model.images import image_mark
from tests import tiny as text_models
from tests.intervention.conformance import SEEING, WHENS
from tests.model import vision_families as vision
from tests.model.vision_families import picture

EDITS = [
    (name, when)
    for name, make in SEEING.items()
    for when in WHENS
    if make(vision.tiny("llava"), when) is not None
]


@pytest.fixture(scope="module")
def model():
    return vision.tiny("llava")


@pytest.fixture(scope="module")
def prompts(model):
    """Of different lengths; one image each."""
    mark = image_mark(model)
    rows = [
        {"text": f"w5 {mark} w6 w7 w8", "answer": " w8 w9 w4", "image": picture(0, 32, 32)},
        {"text": f"w3 w4 w9 {mark} w6", "answer": " w8", "image": picture(1, 32, 48)},
        {"text": f"{mark} w7 w8 w9 w4 w3", "answer": " w6 w9", "image": picture(2, 40, 32)},
    ]
    for row in rows:
        row["char_spans"] = {"text": row["text"][-5:]}
    return interp.tasks.from_examples(model, rows)


def losses(model, prompts, batch_size: int = 3) -> list[float]:
    found = evaluate(model, prompts, batch_size=batch_size, progress=False)
    return found.table["loss"].tolist()


def written(model, prompts, batch_size: int = 3) -> list[list[int]]:
    options = {"max_new_tokens": 4, "batch_size": batch_size, "progress": False}
    return write_captions(model, prompts, **options)["tokens"].tolist()


@pytest.mark.parametrize(("name", "when"), EDITS)
def test_it_acts_is_undone_and_knows_no_neighbours(model, prompts, name, when):
    edit = SEEING[name](model, when)
    plain, said = losses(model, prompts), written(model, prompts)
    with model.intervene(edit):
        together = losses(model, prompts)
        assert_close(losses(model, prompts, batch_size=1), together, atol=2e-5, rtol=1e-4)
        assert written(model, prompts, batch_size=1) == written(model, prompts)
    assert max(abs(a - b) for a, b in zip(plain, together)) > 1e-4
    assert losses(model, prompts) == plain and written(model, prompts) == said


@pytest.mark.parametrize(("name", "when"), EDITS)
def test_an_error_in_the_block_leaves_nothing_behind(model, prompts, name, when):
    plain = losses(model, prompts)
    with pytest.raises(RuntimeError, match="mine"), model.intervene(SEEING[name](model, when)):
        losses(model, prompts)
        raise RuntimeError("mine")
    assert losses(model, prompts) == plain and model.interventions == ()


@pytest.mark.parametrize(("name", "when"), EDITS)
def test_what_is_saved_is_what_is_loaded(model, prompts, tmp_path, name, when):
    edit = SEEING[name](model, when)
    edit.save_pretrained(tmp_path)
    again = load_intervention(tmp_path, model)
    assert again == edit and hash(again) == hash(edit) and again.digest == edit.digest
    with model.intervene(edit):
        expected = losses(model, prompts)
    with model.intervene(tmp_path):
        assert losses(model, prompts) == expected
    assert "hook" in edit.describe(model) or not list(edit.hooks(model))


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_nothing_is_refused(name):
    model = text_models.tiny("llama")
    edit = SEEING[name](vision.tiny("llava"), "both")
    with pytest.raises(interp.errors.UserError, match="image"), model.intervene(edit):
        pass
