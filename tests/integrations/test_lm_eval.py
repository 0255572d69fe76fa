"""lm-evaluation-harness on hooked models, against plain transformers and against direct calls."""

import json
import sys
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import entry_points

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `harness`")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import interp
from interp import cli
from interp.evaluation import EvaluationError
from interp.integrations.lm_eval import HarnessError, InterpLM
from interp.intervention.base import Intervention, InterventionError
from interp.tasks.multiple_choice import examples
from tests.conftest import ROOT
from tests.intervention.test_base import Backwards
from tests.tasks.some_words import smollm2
from tests.tiny import eager, fresh, random_ids, tiny, tokenizer, words

TASKS = ROOT / "data" / "tasks"
# contexts of several lengths, each with continuations of one to three tokens
CONTEXTS = [words(ids) for ids in random_ids(8, 5, 11, 3, 9, seed=2)]
PAIRS = [
    (context, " " + words(ids))
    for n, context in enumerate(CONTEXTS)
    for ids in random_ids(1, 1, 3, 2, seed=n)
]
HEADS = ["L0H1", "L1H3"]
EDITS = {
    "none": [],
    "everywhere": interp.Ablate(HEADS),
    "the prompt": interp.Ablate(HEADS, when="prompt"),
    "what follows": interp.Ablate(HEADS, when="generated"),
    "the prompt's last token": interp.SteerAttention(HEADS, "0:2"),
    "two": [interp.Ablate(HEADS[:1], "uniform"), interp.SteerAttention(HEADS[1:], "0:2", "boost",
                                                                      amount=2.0)],
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Twice(Intervention):
    """Puts every prompt in twice."""

    def hooks(self, model):
        return []

    def prepare(self, prompt, model):
        ids = list(prompt["input_ids"]) * 2
        return {**prompt, "text": f"{prompt['text']} {prompt['text']}", "input_ids": ids}


def instances(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, one, n) for n, one in enumerate(arguments)]


def scored(lm, pairs=PAIRS) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def written(lm, contexts=CONTEXTS, **options) -> list[str]:
    options = {"until": ["w7 w7 w7"], "max_gen_toks": 6, "do_sample": False} | options
    asked = [(context, dict(options)) for context in contexts]
    return lm.generate_until(instances("generate_until", asked), disable_tqdm=True)


def plain(family: str) -> HFLM:
    """The harness' own class on a plain model of the same weights."""
    return HFLM(pretrained=eager(family), tokenizer=deepcopy(tokenizer()), batch_size=2)


def directly(model, edits, pairs=PAIRS) -> list[tuple[float, bool]]:
    """One unpadded row at a time, all logits, and the prompt's length told."""
    found = []
    for context, continuation in pairs:
        ids, more = (tokenizer()(text).input_ids for text in (context, continuation))
        with torch.no_grad(), model.intervene(edits), model.spans(None, [len(ids)]):
            logits = model(torch.tensor([ids + more]))[0].double().log_softmax(-1)
        rows = logits[len(ids) - 1 : -1]
        greedy = rows.argmax(-1).tolist() == more
        found.append((float(rows[range(len(more)), more].sum()), greedy))
    return found


def assert_same(found, expected) -> None:
    for (one, greedy), (other, as_greedy) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-4) and greedy == as_greedy


# Log-likelihoods


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mistral"])
def test_without_an_edit_it_is_the_harness_own_model(family, batch_size):
    lm = InterpLM(tiny(family), batch_size=batch_size)
    assert_same(scored(lm), scored(plain(family)))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_means_what_it_means_in_a_direct_call(family, name, batch_size):
    """Whatever else is in the batch: "the last token" is the prompt's, not the padded row's."""
    model = tiny(family)
    lm = InterpLM(model, intervention=EDITS[name], batch_size=batch_size)
    found = scored(lm)
    assert_same(found, directly(model, EDITS[name]))
    assert not model.applied
    if name not in ("none", "what follows"):
        apart = [abs(a[0] - b[0]) for a, b in zip(found, directly(model, []))]
        assert sorted(apart)[len(apart) // 4] > 1e-3


def test_an_edit_of_what_follows_leaves_continuations_of_one_token_alone():
    model = tiny("llama")
    lm = InterpLM(model, intervention=EDITS["what follows"], batch_size=4)
    for (_, continuation), (one, _), (other, _) in zip(PAIRS, scored(lm), directly(model, [])):
        assert (abs(one - other) > 1e-3) == (len(continuation.split()) > 1)


def test_order_and_number_of_requests_are_no_matter():
    lm = InterpLM(tiny("llama"), intervention=EDITS["the prompt's last token"], batch_size=3)
    together = scored(lm)
    assert_same(scored(lm, PAIRS[::-1])[::-1], together)
    assert_same([scored(lm, [pair])[0] for pair in PAIRS], together)


def test_continuations_of_one_context_share_a_pass():
    model = tiny("llama")
    passes = []
    for shares in (True, False):
        lm = InterpLM(model, logits_cache=shares, intervention=EDITS["the prompt"])
        before = model._running.passes
        found = scored(lm)
        passes.append(model._running.passes - before)
        assert_same(found, directly(model, EDITS["the prompt"]))
    # two of the four continuations have one token: with one pass a row, they share theirs
    assert passes == [3 * len(CONTEXTS), 4 * len(CONTEXTS)]


@pytest.mark.parametrize("name", ["the prompt", "what follows"])
def test_the_same_tokens_parted_elsewhere_do_not_share(name):
    """Where the prompt ends is part of what an edit is told."""
    ids = random_ids(9, seed=7)[0]
    pairs = [(words(ids[:n]), " " + words(ids[n:])) for n in (8, 7, 6, 4)]
    lm = InterpLM(tiny("llama"), intervention=EDITS[name], batch_size=4)
    assert_same(scored(lm, pairs), directly(tiny("llama"), EDITS[name], pairs))


def test_spaces_at_a_context_s_end_and_an_empty_one_are_the_harness_business():
    pairs = [("w5 w6  ", "w7"), ("", "w5 w6"), ("w5 w6", " w7")]
    found = scored(InterpLM(tiny("llama"), batch_size=2), pairs)
    assert_same(found, scored(plain("llama"), pairs))
    assert found[0] == pytest.approx(found[2])


@pytest.mark.parametrize("name", ["none", "the prompt's last token"])
def test_a_long_context_loses_its_beginning(name):
    """The window has 64 tokens, and the last one is predicted only."""
    model, ids = tiny("llama"), random_ids(90, seed=4)[0]
    pairs = [(words(ids[:80]), " " + words(ids[80:83])), (words(ids[:5]), " w9")]
    found = scored(InterpLM(model, intervention=EDITS[name], batch_size=2), pairs)
    cut = [(words(ids[18:80]), pairs[0][1]), pairs[1]]
    assert_same(found, directly(model, EDITS[name], cut))
    if name == "none":
        assert_same(found, scored(plain("llama"), pairs))
    with pytest.raises(HarnessError, match="a continuation of 70 tokens.*window has 64"):
        scored(InterpLM(model), [("w5", " " + words(ids[:70]))])


def test_the_model_is_as_it_was():
    model = fresh("llama")
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    pad, direct = model.tokenizer.pad_token, directly(model, [])
    scored(InterpLM(model, intervention=EDITS["two"], batch_size=4))
    assert directly(model, []) == direct and model.tokenizer.pad_token == pad
    after = model.original_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_an_outer_block_counts_too():
    model, edit = tiny("llama"), EDITS["everywhere"]
    with model.intervene(edit):
        lm = InterpLM(model)
        found = scored(lm)
        assert lm.get_model_info()["interp"]["interventions"][0]["digest"] == edit.digest
    assert_same(found, directly(model, edit))


# Rolling likelihoods


def rolled(lm, texts) -> list[float]:
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))


def test_rolling_without_an_edit_is_the_harness_own():
    texts = [words(ids) for ids in random_ids(12, 30, 150, seed=6)]
    found = rolled(InterpLM(tiny("llama"), batch_size=2), texts)
    assert found == pytest.approx(rolled(plain("llama"), texts), abs=1e-3)


@pytest.mark.parametrize("name", ["everywhere", "the prompt", "what follows"])
def test_all_of_a_rolling_text_is_prompt(name):
    model, ids = tiny("llama"), random_ids(12, seed=6)[0]
    lm = InterpLM(model, intervention=EDITS[name])
    found = rolled(lm, [words(ids)])
    with torch.no_grad(), model.intervene(EDITS[name]):
        logits = model(torch.tensor([[lm.prefix_token_id, *ids]]))[0, :-1].log_softmax(-1)
    assert found[0] == pytest.approx(float(logits[range(12), ids].sum()), abs=1e-3)


@pytest.mark.parametrize("edit", [Backwards(shift=0.5), Twice()], ids=["acausal", "prepares"])
def test_where_a_text_has_no_likelihood_it_is_refused(edit):
    with pytest.raises(EvaluationError, match="no meaning"):
        rolled(InterpLM(tiny("llama"), intervention=edit), ["w5 w6 w7"])


def test_answers_have_one_under_what_is_not_causal():
    edit = Backwards(shift=0.5)
    lm = InterpLM(tiny("llama"), intervention=edit, batch_size=4)
    assert_same(scored(lm), directly(tiny("llama"), edit))


# Writing


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", EDITS)
def test_it_writes_what_a_direct_call_writes(name, batch_size):
    model = tiny("llama")
    found = written(InterpLM(model, intervention=EDITS[name], batch_size=batch_size))
    expected = []
    for context in CONTEXTS:
        batch = model.batch([tokenizer()(context).input_ids])
        with model.intervene(EDITS[name]):
            new = model.continue_greedily(batch.input_ids, batch.attention_mask, 6)
        expected.append(tokenizer().decode(new[0], skip_special_tokens=True))
    assert [text.strip() for text in found] == [text.strip() for text in expected]
    if name == "none":
        assert found == written(plain("llama"))
    elif name != "the prompt's last token":
        assert found != written(plain("llama"))


def test_writing_stops_where_it_is_told():
    model = tiny("llama")
    whole = written(InterpLM(model), CONTEXTS[:1])[0].split()
    cut = written(InterpLM(model), CONTEXTS[:1], until=[whole[2]])[0].split()
    assert cut == whole[: whole.index(whole[2])]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prompts_are_changed_before_they_go_in(batch_size):
    model = tiny("llama")
    lm = InterpLM(model, intervention=Twice(), batch_size=batch_size)
    doubled = [(f"{context} {context}", more) for context, more in PAIRS]
    assert_same(scored(lm), directly(model, [], doubled))
    expected = written(InterpLM(model), [f"{context} {context}" for context in CONTEXTS])
    assert written(lm) == expected


# What it keeps and refuses


def test_answers_of_another_intervention_are_not_looked_up(tmp_path):
    model, database = tiny("llama"), str(tmp_path / "answers.db")
    edit = EDITS["everywhere"]
    first = scored_by(CachingLM(InterpLM(model, intervention=edit), database))
    lm = InterpLM(model, intervention=interp.Ablate(HEADS))  # an equal one
    before = model._running.passes
    assert scored_by(CachingLM(lm, database)) == first and model._running.passes == before
    for other in ([], EDITS["the prompt"], [edit, edit]):
        with pytest.raises(HarnessError, match="use_cache: .* other interventions"):
            CachingLM(InterpLM(model, intervention=other), database)
    with pytest.raises(HarnessError, match="another model"):
        CachingLM(InterpLM(tiny("gpt2"), intervention=edit), database)


def scored_by(lm) -> list:
    return [tuple(one) for one in lm.loglikelihood(instances("loglikelihood", PAIRS))]


def test_answers_of_a_plain_model_are_not_taken_over(tmp_path):
    database = str(tmp_path / "answers.db")
    scored_by(CachingLM(plain("llama"), database))
    with pytest.raises(HarnessError, match="use_cache"):
        CachingLM(InterpLM(tiny("llama")), database)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"interventions": "runs/act"}, HarnessError, "interventions='runs/act'.*intervention"),
        ({"peft": "runs/lora"}, HarnessError, "peft='runs/lora': no such option"),
        ({"intervention": "runs/none"}, InterventionError, "'runs/none': no intervention.json"),
        ({"intervention": interp.Ablate(["L9H0"])}, interp.heads.HeadError, "L9H0"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(options, error, said):
    with pytest.raises(error, match=said):
        InterpLM(tiny("llama"), **options)


def test_a_model_without_a_tokenizer_is_refused():
    model = fresh("llama")
    model._tokenizer = None
    with pytest.raises(HarnessError, match="no tokenizer"):
        InterpLM(model)


# Through the harness


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS))


def ran(manager, model, **options) -> dict:
    return simple_evaluate(
        model=model, task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **options
    )


@pytest.fixture(scope="module")
def mini(mini_llama):
    return interp.load(mini_llama, device="cpu")


@pytest.fixture(scope="module")
def letters(mini):
    """Heads that matter for letters, in the model that lies here."""
    return interp.Ablate([(layer, head) for layer in (2, 3) for head in range(8)])


def test_it_has_a_name_in_the_harness():
    assert get_model("interp") is InterpLM
    found = [point.load() for point in entry_points(group="lm_eval.models", name="interp")]
    assert found in ([], [InterpLM])  # none where it is run from a checkout


def test_the_tasks_differ_as_our_own_evaluation_says(manager, mini, letters):
    rows = [json.loads(line) for line in (TASKS / "letters.jsonl").read_text().splitlines()][:24]
    prompts = interp.tasks.from_examples(
        mini, [{**row, "answer": row["choices"][row["answer"]]} for row in rows]
    )
    ours = interp.compare(mini, prompts, {"none": [], "edit": letters}, progress=False)
    for name, edit in (("none", []), ("edit", letters)):
        lm = InterpLM(mini, intervention=edit, batch_size=4)
        names = ["interp_letters", "interp_letters_written"]
        found = ran(manager, lm, tasks=names, limit=24)
        table = ours.evaluations[name].table
        scores = [sample["acc"] for sample in found["samples"]["interp_letters"]]
        assert scores == (table["logit_diff"] > 0).astype(float).tolist()
        written = found["results"]["interp_letters_written"]["exact_match,letter"]
        assert written == pytest.approx(table["correct"].mean())
        assert found["config"]["interp"]["interventions"] == [
            {"type": "Ablate", "digest": edit.digest, "words": repr(edit)} for edit in [letters]
            if edit is not None and name == "edit"
        ]  # fmt: skip
        json.dumps(found["config"]["interp"])
    accuracy = [ours.evaluations[name].accuracy for name in ("none", "edit")]
    assert accuracy[0] > accuracy[1] + 0.3


def test_a_model_may_be_named_and_given_as_an_object(manager, mini, letters, tmp_path):
    letters.save_pretrained(tmp_path / "edit")
    options = {"tasks": ["interp_letters"], "limit": 4}
    by_name = ran(
        manager,
        "interp",
        model_args=f"pretrained=mini-llama,intervention={tmp_path}/edit",
        device="cpu",
        batch_size=2,
        **options,
    )
    by_object = ran(
        manager, "interp", model_args={"pretrained": mini, "intervention": letters}, **options
    )
    samples = [
        [sample["resps"] for sample in run["samples"]["interp_letters"]]
        for run in (by_name, by_object)
    ]
    for one, other in zip(*samples, strict=True):
        for (a,), (b,) in zip(one, other, strict=True):
            assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]


def test_the_rows_are_what_the_task_makes():
    """Another seed than studies fit on."""
    made = [
        {"text": e["text"], "choices": e["choices"], "answer": e["choices"].index(e["answer"])}
        for e in examples(100, seed=1000)
    ]
    text = (TASKS / "letters.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == made


def test_the_needles_are_those_of_our_command_line():
    """`interp eval smollm2-135m --task needle --lengths 192 --n 30 --seed 1`, as the README has."""
    made = interp.tasks.needle(smollm2(), [192], n=30, seed=1)
    rows = [{"text": row["text"], "answer": row["answer"]} for row in made]
    text = (TASKS / "needles.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_the_command_line_forwards_to_the_harness(letters, tmp_path, capsys, monkeypatch):
    letters.save_pretrained(tmp_path / "edit")
    arguments = list(sys.argv)
    status = cli.main([
        "lm-eval", "--model_args", f"pretrained=mini-llama,intervention={tmp_path}/edit",
        "--include_path", str(TASKS), "--tasks", "interp_letters", "--limit", "6",
        "--batch_size", "4", "--output_path", str(tmp_path / "out"),
    ])  # fmt: skip
    assert status == 0 and sys.argv == arguments
    assert "interp_letters" in capsys.readouterr().out
    results = list((tmp_path / "out").rglob("results_*.json"))
    assert json.loads(results[0].read_text())["config"]["interp"]["interventions"][0]["digest"] == (
        letters.digest
    )


def test_the_command_line_s_mistakes_are_one_line(capsys):
    words = ["--model_args", "pretrained=mini-llama,intervention=runs/none"]
    words += ["--include_path", str(TASKS), "--tasks", "interp_letters"]
    assert cli.main(["lm-eval", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "'runs/none': no intervention.json" in said
