"""lmms-eval on hooked models: against direct calls, with a stand-in where it is not installed."""

import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType

import pytest
import torch
from datasets import load_dataset
from torch.testing import assert_close

import interp
from interp.evaluation import forced_logits
from interp.intervention.base import InterventionError
from interp.model.images import ImageError, image_mark, images_of
from interp.tasks import from_examples
from tests import tiny
from tests.conftest import ROOT
from tests.model import vision_families as vision
from tests.model.vision_families import picture

TASKS = ROOT / "data" / "tasks" / "lmms"
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
HEADS = ["L0H1", "L1H3"]
EDITS = {
    "none": [],
    "a head less": interp.Ablate(HEADS),
    "what follows": interp.Ablate(HEADS, when="generated"),
    "the image": interp.SteerAttention(HEADS, "image*", "boost", amount=2.0),
}


def stand_in() -> None:
    """As much of lmms-eval 0.7.3 as the adapter touches."""

    class Lmms:
        def __init__(self):
            self.task_dict = {}

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None

    @dataclass
    class GenerationResult:
        text: object

    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module


@pytest.fixture(scope="module")
def adapter():
    """The adapter's module; what stands in for the harness is gone afterwards."""
    name = "interp.integrations.lmms_eval"
    if INSTALLED:
        yield importlib.import_module(name)
        return
    stand_in()
    try:
        yield importlib.import_module(name)
    finally:
        for other in [n for n in sys.modules if n == name or n.split(".")[0] == "lmms_eval"]:
            del sys.modules[other]


@dataclass
class Request:
    args: tuple


DOCUMENTS = [
    {"images": [picture(0, 16, 32)], "question": "w5 w6 w7", "answer": "w8"},
    {"images": [picture(1), picture(2, 24, 16)], "question": "w9 w5", "answer": "w10 w11"},
    {"images": [], "question": "w3 w4 w5 w6", "answer": "w7 w8 w9"},
    {"images": [picture(3)], "question": "w5 <image> w11", "answer": "w12"},
]


def made(adapter, family="llava", edit=(), **options):
    lm = adapter.InterpLMMS(vision.tiny(family), edit, batch_size=3, **options)
    lm.task_dict = {"shapes": {"test": DOCUMENTS}}
    return lm


def visuals(document):
    return document["images"]


def writing(**settings) -> list[Request]:
    settings = {"max_new_tokens": 4, "do_sample": False, "temperature": 0} | settings
    return [
        Request((doc["question"], dict(settings), visuals, n, "shapes", "test"))
        for n, doc in enumerate(DOCUMENTS)
    ]


def scoring() -> list[Request]:
    return [
        Request((doc["question"], f" {word}", visuals, n, "shapes", "test"))
        for n, doc in enumerate(DOCUMENTS)
        for word in (doc["answer"], "w3", "w4 w5 w6")
    ]


def scored(lm, requests) -> list[tuple[float, bool]]:
    return [result.text for result in lm.loglikelihood(requests)]


def prompts(family: str, answers=None):
    """The same by hand: the images' marks, then the question."""
    model = vision.tiny(family)
    mark, rows = image_mark(model), []
    for n, doc in enumerate(DOCUMENTS):
        text = f"{mark * len(doc['images'])} {doc['question']}".strip()
        if "<image>" in doc["question"]:
            text = doc["question"].replace("<image>", mark)
        for answer in [""] if answers is None else answers[n]:
            rows.append({"text": text, "image": doc["images"] or None, "answer": answer})
    return from_examples(model, rows)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_answers_are_those_of_greedy_decoding_one_by_one(adapter, family, edit):
    if edit == "the image":
        pytest.skip("a document without an image has no such span")
    model, rows = vision.tiny(family), prompts(family)
    wanted = []
    with model.intervene(EDITS[edit]):
        for row in rows:
            batch = model.batch([row["input_ids"]], images=[row["image"]])
            with model.spans([{}], [len(row["input_ids"])]):
                new = model.continue_greedily(
                    batch.input_ids, batch.attention_mask, 4, **batch.inputs
                )
            tokens = [t for t in new[0].tolist() if t > 2]
            wanted.append(model.tokenizer.decode(tokens, skip_special_tokens=True))
    assert made(adapter, family, EDITS[edit]).generate_until(writing()) == wanted


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_losses_are_those_of_a_forward_pass(adapter, family, edit):
    model = vision.tiny(family)
    requests = scoring()
    if edit == "the image":  # the third document has none
        requests = [r for r in requests if r.args[3] != 2]
    answers = [[r.args[1] for r in requests if r.args[3] == n] for n in range(len(DOCUMENTS))]
    rows = prompts(family, answers)
    wanted = {}
    with model.intervene(EDITS[edit]):
        for n, row in enumerate(rows):
            given = rows.select([n])
            spans = [{k: v for k, v in row["spans"].items() if v}]
            for one in forced_logits(
                model, given["input_ids"], given["answer_ids"], spans=spans, images=images_of(given)
            ):
                losses = one.logits[0].log_softmax(-1)[range(one.target.shape[1]), one.target[0]]
                wanted[n] = (float(-losses.mean()), bool(one.greedy[0]))
    found = scored(made(adapter, family, EDITS[edit]), requests)
    assert_close(torch.tensor([a for a, _ in found]), torch.tensor([wanted[n][0] for n in wanted]))
    assert [b for _, b in found] == [wanted[n][1] for n in wanted]
    assert made(adapter, family).loglikelihood([]) == []


def test_an_intervention_changes_answers_and_is_undone(adapter, tmp_path):
    lm, edit = made(adapter), EDITS["a head less"]
    before = scored(lm, scoring()), lm.generate_until(writing())
    edited = made(adapter, edit=edit)
    after = scored(edited, scoring()), edited.generate_until(writing())
    changed = [abs(a[0] - b[0]) > 1e-4 for a, b in zip(before[0], after[0])]
    assert sum(changed) > len(changed) / 2
    assert (scored(lm, scoring()), lm.generate_until(writing())) == before
    for n, one in enumerate((edit, interp.Temperature(HEADS, 2.0))):
        one.save_pretrained(tmp_path / str(n))
    folder = made(adapter, edit=str(tmp_path / "0"))
    assert scored(folder, scoring()) == after[0]
    both = made(adapter, edit=f"{tmp_path / '0'}:{tmp_path / '1'}")
    info = both.get_model_info()["interp"]["interventions"]
    assert [one["type"] for one in info] == ["Ablate", "Temperature"]
    assert info[0]["digest"] == edit.digest


def test_text_is_cut_and_settings_are_kept_apart(adapter):
    lm = made(adapter)
    whole = lm.generate_until(writing())
    words = whole[0].split()
    stop = words[1]
    requests = writing()
    requests[0] = Request((requests[0].args[0], {"max_new_tokens": 4, "until": [stop]},
                           *requests[0].args[2:]))  # fmt: skip
    requests[1] = Request((requests[1].args[0], {"max_new_tokens": 2}, *requests[1].args[2:]))
    found = lm.generate_until(requests)
    assert found[0] == whole[0][: whole[0].find(stop)]
    assert found[1].split() == whole[1].split()[:2] and found[2:] == whole[2:]
    assert adapter.cut("a b c", ["c", "b"]) == "a " and adapter.cut("a", []) == "a"
    torch.manual_seed(0)
    drawn = lm.generate_until(writing(do_sample=True, temperature=50.0))
    assert drawn != whole


def test_a_continuation_may_be_told_by_the_document(adapter):
    lm = made(adapter)
    told, given = (
        [Request((doc["question"], answer, visuals, n, "shapes", "test"))
         for n, doc in enumerate(DOCUMENTS)
         for answer in [(lambda d: " " + d["answer"]) if by_function else " " + doc["answer"]]]
        for by_function in (True, False)
    )  # fmt: skip
    assert scored(lm, told) == scored(lm, given)


def test_what_can_t_be_is_said(adapter):
    error = adapter.HarnessError
    with pytest.raises(ImageError, match="takes no images"):
        adapter.InterpLMMS(tiny.tiny("llama"))
    with pytest.raises(InterventionError, match="no intervention.json"):
        made(adapter, edit=str(ROOT))
    with pytest.raises(error, match="max_frames=3: no such option"):
        made(adapter, max_frames=3)
    with pytest.raises(error, match="batch_size='auto'"):
        adapter.InterpLMMS(vision.tiny("llava"), batch_size="auto")
    lm = made(adapter)
    with pytest.raises(error, match="one round only"):
        lm.generate_until_multi_round([])
    video = Request(("w5", {}, lambda doc: ["clip.mp4"], 0, "shapes", "test"))
    with pytest.raises(error, match="task shapes: document 0 shows a str"):
        lm.generate_until([video])
    marks = Request(("w5 <image> <image>", {}, visuals, 0, "shapes", "test"))
    with pytest.raises(error, match="2 times <image>, and 1 images"):
        lm.generate_until([marks])


def test_the_manifest_names_the_class(adapter):
    told = adapter.manifest()
    assert told.model_id == "interp"
    module, _, name = told.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is adapter.InterpLMMS
    points = [p for p in entry_points(group="lmms_eval.models") if p.name == "interp"]
    for point in points:
        assert point.load() is adapter.manifest


# The example task


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(f"lmms_{name}", TASKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_scenes_are_those_that_make_py_makes(tmp_path):
    made = module_of("make").rows()
    stored = load_dataset(
        "parquet", data_files={"test": str(TASKS / "scenes.parquet")}, cache_dir=str(tmp_path)
    )["test"]
    assert len(stored) == len(made) == 48
    for row, other in zip(stored, made):
        assert row["image"].tobytes() == other["image"].tobytes()
        assert {k: row[k] for k in row if k != "image"} == {
            k: other[k] for k in other if k != "image"
        }
    read = module_of("read")
    first = stored[0]
    assert read.images(first) == [first["image"]] and read.question(first) == first["question"]
    assert first["choices"][read.right(first)] == first["answer"]


def test_answers_are_scored_by_their_first_word():
    read = module_of("read")
    polled = {"answer": "Yes", "kind": "exists"}
    assert read.score(polled, [" yes, there is."]) == {"right": 1.0, "said_yes": 1.0}
    assert read.score(polled, ["No."]) == {"right": 0.0, "said_yes": 0.0}
    assert read.score({"answer": "red", "kind": "color"}, [""]) == {"right": 0.0, "said_yes": None}
    assert read.share([1.0, None, 0.0]) == 0.5


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval")
@pytest.mark.parametrize("edit", [None, interp.Ablate(HEADS)])
def test_the_harness_runs_the_tasks(adapter, edit, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    lm = adapter.InterpLMMS(vision.tiny("llava"), edit or [], batch_size=8)
    results = simple_evaluate(
        model=lm,
        tasks=["interp_scenes", "interp_scenes_choice"],
        task_manager=TaskManager("ERROR", include_path=str(TASKS)),
        limit=6,
        bootstrap_iters=0,
    )
    for name, metric in (("interp_scenes", "right"), ("interp_scenes_choice", "acc")):
        value = results["results"][name][f"{metric},none"]
        assert 0 <= value <= 1
        assert len(results["samples"][name]) == 6
