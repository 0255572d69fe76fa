"""Digests, and files of interventions: what is read back, and what is refused."""

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

import interp
from interp.errors import UserError
from interp.intervention.base import MODULES, Hook, Intervention, InterventionError
from tests.intervention.conformance import INTERVENTIONS
from tests.tiny import tiny, unchecked

HEADS = ["L0H1", "L1H2"]
BANK = torch.arange(12.0).reshape(2, 2, 3)


@dataclass(frozen=True, eq=False)
class Nothing(Intervention):
    """An intervention of somebody else's."""

    heads: tuple[interp.Head, ...] = ()
    vector: torch.Tensor | None = None

    def hooks(self, model: interp.HookedModel) -> Iterable[Hook]:
        return []


def resampled(**changes) -> interp.Ablate:
    values = {"heads": HEADS, "how": "resample", "when": "both", "bank": BANK, "seed": 1} | changes
    return interp.Ablate(**values)


def test_equal_contents_are_equal():
    one, other = resampled(), resampled(bank=BANK.clone())
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert one.digest == other.digest and len(one.digest) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"heads": ["L0H1", "L1H3"]},
        {"how": "mean"},
        {"when": "prompt"},
        {"seed": 2},
        {"bank": None},
        {"bank": BANK + 1e-6},
        {"bank": BANK.double()},
        {"bank": BANK.reshape(2, 3, 2)},
    ],
)
def test_any_other_content_is_another_intervention(change):
    assert resampled(**change) != resampled()
    assert resampled(**change).digest != resampled().digest


def test_another_type_is_another_intervention():
    heads = (interp.Head(0, 1),)
    assert Nothing(heads) != interp.Ablate(heads) and Nothing(heads) != "Nothing"
    assert Nothing(heads) == Nothing(heads)


def test_bf16_and_views_have_digests():
    half = Nothing(vector=torch.ones(4, dtype=torch.bfloat16))
    assert half == Nothing(vector=torch.ones(8, dtype=torch.bfloat16)[::2])
    assert half != Nothing(vector=torch.ones(4))


def test_every_type_that_can_be_loaded_is_put_through_the_trials():
    listed = {type(make(tiny("llama"), "both")).__name__ for make in INTERVENTIONS.values()}
    assert listed == set(MODULES)


def test_describe_counts_what_is_stored():
    assert "stored numbers: 12" in resampled().describe()
    assert "stored numbers: 0" in interp.Ablate(HEADS).describe()


# Files


@pytest.fixture
def folder(tmp_path):
    return resampled().save_pretrained(tmp_path / "edit")


def rewrite(folder, **changes) -> None:
    """Change intervention.json; None takes a key out."""
    record = json.loads((folder / "intervention.json").read_text()) | changes
    record = {key: value for key, value in record.items() if value is not None}
    (folder / "intervention.json").write_text(json.dumps(record))


def refused(folder, said: str) -> None:
    with unchecked(), pytest.raises(InterventionError, match=said) as caught:
        interp.load_intervention(folder)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_folder_holds_json_and_safetensors(folder):
    assert {path.name for path in folder.iterdir()} == {
        "intervention.json", "vectors.safetensors", "README.md",
    }  # fmt: skip
    record = json.loads((folder / "intervention.json").read_text())
    assert record["type"] == "Ablate" and record["version"] == 1
    assert record["parameters"]["heads"] == HEADS and record["tensors"] == {"bank": [2, 2, 3]}
    assert "interp.load_intervention" in (folder / "README.md").read_text()
    assert interp.load_intervention(str(folder)) == resampled()


def test_another_class_is_not_loaded_as_this_one(folder):
    with pytest.raises(InterventionError, match="holds Ablate, not Nothing"):
        Nothing.from_pretrained(folder)
    assert Intervention.from_pretrained(folder) == resampled()


def test_a_folder_without_one(tmp_path):
    refused(tmp_path / "none", "no intervention.json there")


@pytest.mark.parametrize("text", ["", "not JSON", "[1, 2]", "3", "{}"])
def test_a_file_that_is_none_of_ours(folder, text):
    (folder / "intervention.json").write_text(text)
    refused(folder, "not an intervention of ours")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"version": 2}, "version 2; this interp reads .* up to version 1. Upgrade"),
        ({"version": "1"}, "not an intervention of ours"),
        ({"format": "other"}, "format other"),
        ({"format": "other", "version": None}, "format other version None"),
        ({"type": "Ablat"}, "unknown type 'Ablat'; this interp has Ablate"),
        ({"type": None}, "'type' is missing or damaged"),
        ({"type": "os.system"}, "unknown type 'os.system'"),
        ({"parameters": None}, "'parameters' is missing or damaged"),
        ({"tensors": [1]}, "'tensors' is missing or damaged"),
        ({"parameters": {"heads": HEADS, "strength": 2}}, "Ablate has no parameter 'strength'"),
        ({"parameters": {"heads": HEADS, "how": "half"}}, "how='half': one of zero, mean"),
        ({"parameters": {"heads": HEADS, "how": "zero"}}, "how='zero' takes none"),
        ({"parameters": {"heads": HEADS[:1], "how": "mean"}}, r"should be \[1 heads"),
        ({"parameters": {"how": "mean"}}, "Ablate needs the parameter 'heads'"),
        ({"tensors": {"bank": [2, 3, 2]}}, r"bank is \[2, 2, 3\], and should be \[2, 3, 2\]"),
        ({"tensors": {"bank": [2, 2, 3], "other": [1]}}, "vectors.safetensors: can't be read"),
    ],
)
def test_a_record_that_was_changed(folder, changes, said):
    rewrite(folder, **changes)
    refused(folder, said)


def test_vectors_that_are_missing(folder):
    (folder / "vectors.safetensors").unlink()
    refused(folder, "vectors.safetensors: can't be read")


def test_pickles_are_not_read(folder):
    class Spy:
        def __reduce__(self):
            return pytest.fail, ("a pickle was read",)

    (folder / "vectors.safetensors").write_bytes(pickle.dumps(Spy()))
    refused(folder, "vectors.safetensors: can't be read")
    torch.save({"bank": BANK}, folder / "vectors.safetensors")
    refused(folder, "vectors.safetensors: can't be read")


def test_vectors_that_were_cut_short(folder):
    path = folder / "vectors.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(folder, "vectors.safetensors: can't be read")


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_vectors_that_are_no_numbers(folder, number):
    spoilt = BANK.clone()
    spoilt[1, 0, 2] = number
    save_file({"bank": spoilt}, folder / "vectors.safetensors")
    refused(folder, "bank holds NaN or infinite")


def test_vectors_that_need_gradients_are_saved(tmp_path):
    learnt = resampled(bank=BANK.clone().requires_grad_())
    assert interp.load_intervention(learnt.save_pretrained(tmp_path)) == resampled()
