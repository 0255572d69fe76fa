"""The contract: digests, what may be applied, files, and what is refused."""

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import interp
from interp.errors import UserError
from interp.evaluation import EvaluationError
from interp.intervention import base
from interp.intervention.base import MODULES, Hook, Intervention, InterventionError
from interp.intervention.made_on import MadeOn
from tests.intervention.conformance import INTERVENTIONS, PREPARING, SEEING, WHENS
from tests.model import vision_families as vision
from tests.tiny import fresh, random_ids, tiny, unchecked, with_answers, words

HEADS = ["L0H1", "L1H2"]
BANK = torch.arange(12.0).reshape(2, 2, 3)


@dataclass(frozen=True, eq=False)
class Nothing(Intervention):
    """An intervention of somebody else's."""

    heads: tuple[interp.Head, ...] = ()
    vector: torch.Tensor | None = None
    table: Mapping[Any, Any] | None = None

    def hooks(self, model: interp.HookedModel) -> Iterable[Hook]:
        return []

    @classmethod
    def fit(cls, model: interp.HookedModel, vector: torch.Tensor) -> "Nothing":
        return cls(vector=vector)


@dataclass(frozen=True, eq=False)
class Plus(Intervention):
    """Add `shift` to the last layer's output, then multiply by `factor`."""

    shift: float = 0.0
    factor: float = 1.0

    def hooks(self, model: interp.HookedModel) -> Iterable[Hook]:
        return [("blocks.1.hook_resid_post", lambda x, hook: (x + self.shift) * self.factor)]


class Backwards(Plus):
    """Reads the text from its end, or so it says."""

    causal: ClassVar[bool] = False


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


def test_a_dict_is_what_it_holds_in_any_order():
    one, other = Nothing(table={"a": 1, "b": [2]}), Nothing(table={"b": (2,), "a": 1})
    assert one == other != Nothing(table={"a": 1, "b": [3]})
    assert Nothing(table={interp.Head(0, 1): 2.0}) == Nothing(table={"L0H1": 2.0})
    with pytest.raises(InterventionError, match="table: the key 3 is neither text nor a head"):
        hash(Nothing(table={3: 1}))


def test_every_type_that_can_be_loaded_is_put_through_the_trials():
    factories = [*INTERVENTIONS.values(), *PREPARING.values()]
    made = [make(tiny("llama"), when) for make in factories for when in WHENS]
    made += [make(vision.tiny("llava"), when) for make in SEEING.values() for when in WHENS]
    assert {type(edit).__name__ for edit in made if edit is not None} == set(MODULES)


def test_describe_says_what_is_stored_and_where_it_acts():
    said = resampled().describe()
    assert "stored numbers: 12 (bank [2, 2, 3])" in said and "made on" not in said
    assert "stored numbers: 0\n" in interp.Ablate(HEADS).describe(tiny("llama"))
    hooks = "hook: blocks.0.attn.hook_z\nhook: blocks.1.attn.hook_z"
    assert interp.Ablate(HEADS).describe(tiny("llama")).endswith(hooks)
    fitted = Nothing.fit(tiny("llama"), torch.ones(3))
    made_on = "made on: LlamaForCausalLM (LlamaForCausalLM, 2 layers x 4 heads of width 8)"
    assert made_on in fitted.describe() and "not causal" not in fitted.describe()
    assert "not causal: likelihoods of a prompt's own tokens" in Backwards().describe()


# What may be applied, to which model


def residual(model, *edits) -> torch.Tensor:
    """The last layer's output under interventions."""
    seen = []
    look = ("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.clone()))
    with torch.no_grad(), model.intervene(*edits), model.hooks(fwd_hooks=[look]):
        model(torch.tensor(random_ids(6)))
    return seen[0]


def test_they_act_in_the_order_in_which_they_are_given(tmp_path):
    model, plus, times = tiny("llama"), Plus(shift=1.0), Plus(factor=2.0)
    before = residual(model)
    assert_close(residual(model, plus, times), (before + 1) * 2)
    assert_close(residual(model, [times, [plus]]), before * 2 + 1)
    with model.intervene(plus):
        assert_close(residual(model, times), (before + 1) * 2)
        assert model.applied == (plus,) and len(model.interventions) == 1
    assert torch.equal(residual(model, []), before) and torch.equal(residual(model, None), before)
    assert model.applied == ()


def test_a_folder_is_applied_as_what_is_saved_in_it(tmp_path):
    model, edit = tiny("llama"), interp.Ablate(["L0H1", "L1H2"])
    folder = edit.save_pretrained(tmp_path / "edit")
    expected = residual(model, edit)
    for given in (folder, str(folder), [folder]):
        assert torch.equal(residual(model, given), expected)
    with model.intervene(folder):
        assert model.provenance()["interventions"] == [f"{edit!r} {edit.digest[:12]}"]


@pytest.mark.parametrize(
    "given, said",
    [
        (3, "int is none"),
        (["runs/none"], "no intervention.json"),
        (interp.Ablate, "the class Ablate"),
    ],
)
def test_what_is_no_intervention_is_refused(given, said):
    with pytest.raises(InterventionError, match=said), tiny("llama").intervene(given):
        raise AssertionError("the block was entered")


def test_a_users_own_needs_hooks_only():
    class Mine:
        def hooks(self, model):
            return [("blocks.1.hook_resid_post", lambda x, hook: x + 3)]

    model = tiny("llama")
    assert_close(residual(model, Mine()), residual(model) + 3)


def test_a_fit_remembers_its_model_and_so_do_copies():
    model = tiny("llama")
    edit = Nothing.fit(model, torch.ones(3))
    assert edit.made_on == MadeOn.of(model) == Nothing.fit(model=model, vector=edit.vector).made_on
    assert replace(edit, table={}).made_on == edit.made_on
    assert edit == Nothing(vector=torch.ones(3)) and Nothing().made_on is None


def test_of_a_local_folder_only_its_name_is_kept(stories260k):
    made_on = MadeOn.of(interp.load(stories260k, device="cpu"))
    assert made_on.base_model == "stories260k"
    assert (made_on.n_layers, made_on.n_heads, made_on.n_kv_heads, made_on.d_head) == (5, 8, 4, 8)


def test_a_model_of_the_same_kind_may_have_another_name():
    model, other = tiny("llama"), fresh("llama")
    other.__dict__["name"] = "fine-tuned"
    edit = Nothing.fit(model, torch.ones(3))
    with other.intervene(edit):
        pass


@pytest.mark.parametrize("number", ["n_layers", "n_heads", "n_kv_heads", "d_head", "d_model"])
def test_a_model_of_another_shape_is_refused(number):
    model = tiny("llama")
    there = MadeOn.of(model)
    made_on = replace(there, **{number: 16})
    said = f"made on LlamaForCausalLM.*{number}=16, not {there.shape[number]}. Fit it on Llama"
    with pytest.raises(InterventionError, match=said), model.intervene(Nothing(made_on=made_on)):
        raise AssertionError("the block was entered")


def test_numbers_that_are_none_are_refused_before_the_model_runs():
    spoilt = Nothing(vector=torch.tensor([1.0, torch.nan]))
    with pytest.raises(InterventionError, match="Nothing: vector holds NaN"):
        spoilt.check_model(tiny("llama"))


# What has a likelihood


def test_under_what_is_not_causal_texts_have_no_loss_and_answers_have():
    model = tiny("llama")
    answered = with_answers(random_ids(6, 4), random_ids(2, 1, seed=3), [(0, 1)] * 2)
    with model.intervene(Backwards(shift=0.5)):
        with pytest.raises(
            EvaluationError, match="without answers .* no meaning .*Backwards.*later"
        ):
            interp.evaluate(model, words(random_ids(6)[0]), progress=False)
        read = interp.evaluate(model, answered, progress=False)
        written = interp.evaluate(model, answered, generate=True, progress=False)
    with model.intervene(Plus(shift=0.5)):
        interp.evaluate(model, words(random_ids(6)[0]), progress=False)
        assert interp.evaluate(model, answered, progress=False).loss == read.loss
    assert read.loss > 0 and written.accuracy >= 0


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


class Spy:
    """Whoever unpickles it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_pickles_are_not_read(folder):
    said = "vectors.safetensors: a pickle.*save_file.torch.load.*weights_only=True"
    for protocol in (2, 5):
        (folder / "vectors.safetensors").write_bytes(pickle.dumps(Spy(), protocol))
        refused(folder, said)
    torch.save({"bank": BANK}, folder / "vectors.safetensors")
    refused(folder, said)


@pytest.mark.parametrize("name", ["vectors.pt", "pytorch_model.bin", "old.pth"])
def test_pickles_in_place_of_vectors_are_named(folder, name):
    (folder / "vectors.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Spy()))
    refused(folder, f"{name}: a pickle, which can run code")
    refused(folder / name, f"{name}: a pickle")
    (folder / "intervention.json").unlink()
    refused(folder, f"{name}: a pickle")


def test_a_file_is_no_folder(folder):
    refused(folder / "intervention.json", "a file; give the folder it is in")


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


def test_what_was_there_before_is_no_part_of_it(folder):
    interp.Ablate(HEADS).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"intervention.json", "README.md"}
    assert interp.load_intervention(folder) == interp.Ablate(HEADS)


def test_a_folder_says_what_it_was_made_on(tmp_path):
    model = tiny("llama")
    folder = interp.Ablate.fit(model, words(random_ids(5)[0]), HEADS).save_pretrained(tmp_path)
    record = json.loads((folder / "intervention.json").read_text())
    assert record["base_model"] == record["architecture"] == "LlamaForCausalLM"
    assert record["revision"] is None
    assert record["shape"] == {
        "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_model": 32,
    }  # fmt: skip
    assert "Made on LlamaForCausalLM (" in (folder / "README.md").read_text()
    assert interp.load_intervention(folder, model).made_on == MadeOn.of(model)
    with pytest.raises(InterventionError, match="architecture LlamaForCausalLM, not GPT2LMHead"):
        interp.Ablate.from_pretrained(folder, tiny("gpt2"))
    rewrite(folder, shape=record["shape"] | {"n_layers": 3})
    with pytest.raises(InterventionError, match="n_layers=3, not 2"):
        interp.load_intervention(folder, model)
    for damaged in ({"n_layers": 2}, [1, 2], {"n_layers": "two"}):
        rewrite(folder, shape=damaged)
        refused(folder, "'shape' is missing or damaged")


def test_a_folder_of_before_shapes_were_kept_is_read(folder):
    rewrite(folder, base_model=None, architecture=None)
    assert interp.load_intervention(folder) == resampled()


def test_dicts_come_back(tmp_path, monkeypatch):
    monkeypatch.setitem(MODULES, "Nothing", __name__)
    table = {"L0H1": {"effect": 0.25, "n": 3}, "L1H2": {"effect": float("inf"), "n": 4}}
    edit = Nothing(table=table, vector=torch.tensor(2.5))
    loaded = interp.load_intervention(edit.save_pretrained(tmp_path))
    assert loaded == edit and loaded.table == table and loaded.vector.shape == ()


def test_a_save_that_was_cut_short_leaves_no_folder_to_load(tmp_path, monkeypatch):
    def broken(path, write):
        if path.name == "intervention.json":
            raise OSError("no space")
        write(path)

    monkeypatch.setattr(base, "write_atomically", broken)
    with pytest.raises(OSError):
        resampled().save_pretrained(tmp_path)
    refused(tmp_path, "no intervention.json")
